"""The turbo-core command: generate, inspect, convert, quantize, merge, plan, doctor, bench, tune, make-tiny, train ...

Exit codes: 0 done, 1 bench found a wrong result, 2 input that a person can mend (one line on stderr), 130 interrupted.
"""

import argparse
import os
import sys
from pathlib import Path

from . import __version__, commands
from .errors import TurboError
from .train.commands import add_verbs as add_training

# as in formats and sla, which need torch: --help does not wait for it
FORMATS = ("int8_block", "int8_row", "bf16", "fp16", "fp32", "fp8")
PRECISIONS = ("bf16", "int8")
DTYPES = ("bfloat16", "float16", "float32")
BENCHMARKS = ("linear", "streaming", "attention", "block")


def main(argv=None) -> int:
    """Run one command and return its exit code."""
    if hasattr(sys.stdout, "reconfigure"):  # a path in Cyrillic, piped on a western Windows, has no letters in cp1252
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = _parser().parse_args(argv)
    # every model is read from the files named; the libraries underneath must not look anything up
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return arguments.run(arguments) or 0
    except TurboError as error:
        if arguments.debug:
            raise
        print(f"turbo-core: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("turbo-core: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="turbo-core", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=__version__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show where an error comes from")
    verbs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(verbs.add_parser("generate", parents=[common], help="prompt (and image) to video"))

    command = verbs.add_parser("inspect", parents=[common], help="what a checkpoint holds")
    command.add_argument("files", nargs="+", type=Path, metavar="FILE")
    command.set_defaults(run=commands.inspect)

    command = verbs.add_parser("convert", parents=[common], help="any checkpoint to safetensors")
    command.add_argument("--format", choices=FORMATS, required=True)
    _add_source_and_target(command)

    command = verbs.add_parser("quantize", parents=[common], help="a float checkpoint to int8")
    command.add_argument("--format", choices=FORMATS[:2], default=FORMATS[0], help="default %(default)s")
    _add_source_and_target(command)

    command = verbs.add_parser("merge", parents=[common], help="an acceleration carried over to a finetune")
    command.add_argument("finetune", type=Path, metavar="FINETUNE", help="any finetune of the original, or rCM weights")
    command.add_argument("--base", type=Path, required=True, metavar="ORIGINAL", help="what all were trained from")
    command.add_argument(
        "--turbo", type=Path, action="append", required=True, metavar="TURBOWAN", help="TurboWan or SLA; repeatable"
    )
    command.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.safetensors")
    command.add_argument("--strength", type=float, action="append", help="one for all or one each; default 1.0")
    command.add_argument("--format", choices=FORMATS, default="bf16", help="default %(default)s")
    command.set_defaults(run=commands.merge)

    _add_plan(verbs.add_parser("plan", parents=[common], help="what a video needs on cards of 8 to 32 GiB"))

    command = verbs.add_parser("doctor", parents=[common], help="what this machine can run, and why not")
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=commands.doctor)

    _add_bench(verbs.add_parser("bench", parents=[common], help="times and errors of the kernels on this machine"))

    command = verbs.add_parser("tune", parents=[common], help="measure and keep this card's own launch parameters")
    command.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="default where turbo-core looks for it")
    command.add_argument("--device", help="cuda, cuda:1; default the best there is")
    command.set_defaults(run=commands.tune)

    command = verbs.add_parser("make-tiny", parents=[common], help="a small family with random weights, for tests")
    command.add_argument("folder", type=Path, metavar="DIR")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=commands.make_tiny)

    command = verbs.add_parser("tinywan", parents=[common], help="TinyWan, a small trained family, into a ComfyUI")
    command.add_argument("models", type=Path, metavar="MODELS", help="ComfyUI's models folder")
    command.set_defaults(run=commands.install_tinywan)

    add_training(verbs, common)
    return parser


def _add_source_and_target(command) -> None:
    command.add_argument("source", type=Path, metavar="SRC")
    command.add_argument("target", type=Path, metavar="DST")
    command.set_defaults(run=commands.convert)


def _add_bench(command) -> None:
    add = command.add_argument
    add("what", nargs="*", choices=(*BENCHMARKS, "all"), default="all", metavar="WHAT", help=", ".join(BENCHMARKS))
    add(
        "--shapes",
        nargs="+",
        default=[],
        metavar="AxB",
        help="MxK streaming, LxDIM block, MxNxK linear, BxHxLxD attention",
    )
    add("--quick", action="store_true", help="tiny shapes, nothing compiled: does it run?")
    add("--check", action="store_true", help="first hold every kernel to an oracle on awkward shapes")
    add("--seconds", type=float, default=2.0, help="for each contender, or 50 runs; default %(default)s")
    add("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR", help="default %(default)s")
    add("--device", help="cuda, cuda:1, mps, cpu; default the best there is")
    add("--threads", type=int, help="of a CPU; default as torch has it")
    command.set_defaults(run=commands.bench)


def _add_plan(command) -> None:
    add = command.add_argument
    add("dit", type=Path, nargs="?", metavar="DIT", help="a checkpoint; without it --model")
    add("--model", choices=("t2v-1.3b", "t2v-14b", "i2v-a14b"), default="t2v-14b", help="default %(default)s")
    add("--experts", type=int, choices=(1, 2), help="files that take turns; default 2 for A14B image-to-video, else 1")
    add("--size", default="832x480", help="WIDTHxHEIGHT, 480p, 720p-9:16 ...; default %(default)s")
    add("--frames", type=int, default=81, help="4n + 1; default %(default)s")
    add("--memory", type=float, metavar="GIB", help="of the card; default 8, 12, 16, 24 and 32")
    add("--format", choices=FORMATS, help="of the weights; default the file's, or int8_block")
    attention = command.add_mutually_exclusive_group()
    attention.add_argument("--topk", type=float, help="key blocks kept; default 0.1 where trained so, else dense")
    attention.add_argument("--dense", action="store_true", help="dense self-attention")
    add("--precision", choices=PRECISIONS, default="bf16", help="of sparse attention; default %(default)s")
    command.set_defaults(run=commands.plan)


def _add_generate(command) -> None:
    add = command.add_argument
    add("--prompt", required=True, help="long English descriptions work best")
    add("--image", type=Path, help="first frame, for image-to-video")
    add("--dit", type=Path, required=True, help="TurboWan checkpoint; of an A14B pair the high-noise one")
    add("--dit-low", type=Path, help="the low-noise expert of an A14B pair")
    add("--vae", type=Path, required=True, help="Wan2.1_VAE.pth or wan_2.1_vae.safetensors")
    add("--text-encoder", type=Path, required=True, help="models_t5_umt5-xxl-enc-bf16.pth or umt5_xxl_*.safetensors")
    add("--tokenizer", type=Path, help="spiece.model, tokenizer.json or their folder; needed when the file has none")
    add("-o", "--output", type=Path, required=True, help="the video, *.mp4")
    add("--contact-sheet", type=Path, metavar="PNG", help="also write a grid of frames")
    add("--json", type=Path, metavar="FILE", help="also write settings, times and memory")
    add("--size", default="832x480", help="WIDTHxHEIGHT, 480p, 720p-9:16 ...; default %(default)s")
    add("--adaptive", action="store_true", help="keep the image's aspect ratio at the area of --size")
    add("--frames", type=int, default=81, help="4n + 1, at 16 a second; default %(default)s")
    add("--steps", type=int, default=4, help="1 to 4; default %(default)s")
    add("--seed", type=int, default=0)
    add("--sigma-max", type=float, help="default 80 for text-to-video, 200 for image-to-video")
    attention = command.add_mutually_exclusive_group()
    attention.add_argument("--topk", type=float, help="key blocks kept; default 0.1 where trained so, else dense")
    attention.add_argument("--dense", action="store_true", help="dense self-attention")
    add("--precision", choices=PRECISIONS, default="bf16", help="of sparse attention; default %(default)s")
    add("--ode", action="store_true", help="deterministic steps: sharper, less robust")
    add("--boundary", type=float, default=0.9, help="sigma of the hand-over between experts; default %(default)s")
    add("--device", help="cuda, cuda:1, mps, cpu; default the best there is")
    add("--dtype", choices=DTYPES, help="default bfloat16, on a CPU float32")
    add("--noise-device", default="cpu", help="cpu (default) gives the same video on every machine")
    add("--tiled", action="store_true", help="decode in tiles: less memory")
    command.set_defaults(run=commands.generate)
