"""The turbo-core command: generate, inspect, convert, quantize, merge, plan, doctor, bench, tune, make-tiny, train ...

Exit codes: 0 done, 1 bench found a wrong result, 2 input that a person can mend (one line on stderr), 130 interrupted.
"""

import argparse
import os
import sys
from pathlib import Path

from .. import __version__
from ..errors import TurboError
from . import advice, bench, files
from .advice import _add_plan
from .bench import _add_bench
from .files import FORMATS, _add_source_and_target
from .generate import _add_generate
from .train import add_verbs as add_training


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
    command.set_defaults(run=files.inspect)

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
    command.set_defaults(run=files.merge)

    _add_plan(verbs.add_parser("plan", parents=[common], help="what a video needs on cards of 8 to 32 GiB"))

    command = verbs.add_parser("doctor", parents=[common], help="what this machine can run, and why not")
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=advice.doctor)

    _add_bench(verbs.add_parser("bench", parents=[common], help="times and errors of the kernels on this machine"))

    command = verbs.add_parser("tune", parents=[common], help="measure and keep this card's own launch parameters")
    command.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="default where turbo-core looks for it")
    command.add_argument("--device", help="cuda, cuda:1; default the best there is")
    command.set_defaults(run=bench.tune)

    command = verbs.add_parser("make-tiny", parents=[common], help="a small family with random weights, for tests")
    command.add_argument("folder", type=Path, metavar="DIR")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=files.make_tiny)

    command = verbs.add_parser("tinywan", parents=[common], help="TinyWan, a small trained family, into a ComfyUI")
    command.add_argument("models", type=Path, metavar="MODELS", help="ComfyUI's models folder")
    command.set_defaults(run=files.install_tinywan)

    add_training(verbs, common)
    return parser
