"""The turbo-core command: generate, inspect, convert, quantize, merge, plan, doctor, make-tiny.

Exit codes: 0 done, 2 input that a person can mend (one line on stderr), 130 interrupted.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

from . import __version__
from .errors import TurboError

FORMATS = ("int8_block", "int8_row", "bf16", "fp16", "fp32", "fp8")
DTYPES = ("bfloat16", "float16", "float32")


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


def _generate(arguments) -> None:
    import torch

    from .console import progress_bars
    from .pipeline import generate
    from .sizes import parse_size
    from .video import check_sheet_path, check_video_path, write_contact_sheet, write_video

    size = parse_size(arguments.size)
    check_video_path(arguments.output)
    if arguments.contact_sheet:
        check_sheet_path(arguments.contact_sheet)
    start = time.perf_counter()
    try:
        with progress_bars() as progress:
            result = generate(
                arguments.prompt,
                arguments.dit,
                arguments.vae,
                arguments.text_encoder,
                dit_low=arguments.dit_low,
                tokenizer=arguments.tokenizer,
                image=arguments.image,
                size=size,
                adaptive=arguments.adaptive,
                frames=arguments.frames,
                steps=arguments.steps,
                seed=arguments.seed,
                sigma_max=arguments.sigma_max,
                topk=None if arguments.dense else "auto" if arguments.topk is None else arguments.topk,
                precision=arguments.precision,
                ode=arguments.ode,
                boundary=arguments.boundary,
                device=arguments.device,
                dtype=arguments.dtype and getattr(torch, arguments.dtype),
                noise_device=arguments.noise_device,
                tiled=arguments.tiled,
                progress=progress,
            )
            progress("write", 0, 1)
            written = time.perf_counter()
            write_video(arguments.output, result.frames)
            if arguments.contact_sheet:
                write_contact_sheet(arguments.contact_sheet, result.frames)
            result.seconds["write"] = time.perf_counter() - written
            progress("write", 1, 1)
    except torch.OutOfMemoryError as error:
        raise TurboError(
            f"Out of device memory ({str(error).splitlines()[0]}). Use the -quant files, a smaller --size, fewer "
            "--frames or --tiled."
        ) from error
    _report(arguments, result, time.perf_counter() - start)


def _report(arguments, result, total: float) -> None:
    from .console import human_bytes, table

    rows = [(name, str(value)) for name, value in result.settings.items() if value is not None]
    if "topk" in result.settings and result.settings["topk"] is None:
        rows.append(("attention", "dense"))
    rows += [(f"time: {stage}", f"{seconds:.2f} s") for stage, seconds in result.seconds.items()]
    rows.append(("time: each step", ", ".join(f"{seconds:.2f}" for seconds in result.step_seconds) + " s"))
    rows.append(("time: total", f"{total:.2f} s"))
    rows += [(f"peak memory: {where}", human_bytes(size)) for where, size in result.peak_memory.items()]
    table(str(arguments.output), rows)
    if arguments.json:
        report = {
            "output": str(arguments.output),
            "settings": result.settings,
            "seconds": result.seconds,
            "step_seconds": result.step_seconds,
            "total_seconds": total,
            "peak_memory": result.peak_memory,
        }
        _write_text(arguments.json, json.dumps(report, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TurboError(f"Could not write {path} ({error}). Check the folder and its rights.") from error


def _inspect(arguments) -> None:
    from . import checkpoint
    from .console import human_bytes, table

    for path in arguments.files:
        found = checkpoint.inspect(path)
        table(
            str(path),
            [
                ("family", found.family),
                ("task", found.task),
                ("format", found.format),
                ("sparse-linear attention", "trained (proj_l)" if found.has_sla else "no proj_l"),
                ("blocks", f"{found.num_layers}, dim {found.dim}, ffn {found.ffn_dim}"),
                ("heads", f"{found.num_heads} x {found.head_dim}"),
                ("channels", f"{found.in_dim} in, {found.out_dim} out, text {found.text_dim}"),
                ("file", f"{found.container}, {found.tensors} tensors, {human_bytes(found.bytes)}"),
                *(("metadata", f"{key} = {_shorten(value)}") for key, value in found.metadata.items()),
                *(("note", note) for note in found.notes),
            ],
        )


def _shorten(value, length: int = 100) -> str:
    text = str(value)
    return text if len(text) <= length else f"{text[:length]}..."


def _convert(arguments) -> None:
    from . import checkpoint
    from .console import human_bytes, progress_bars

    write = checkpoint.quantize if arguments.command == "quantize" else checkpoint.convert
    with progress_bars() as progress:
        done = write(
            arguments.source,
            arguments.target,
            arguments.format,
            progress=lambda count, total: progress(arguments.command, count, total),
        )
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{arguments.target}: {human_bytes(Path(arguments.target).stat().st_size)}, {arguments.format}")


def _merge(arguments) -> None:
    from .console import human_bytes, progress_bars
    from .merge import merge

    with progress_bars() as progress:
        done = merge(
            arguments.finetune,
            arguments.base,
            arguments.turbo,
            arguments.output,
            arguments.format,
            arguments.strength or 1.0,
            progress=lambda count, total: progress("merge", count, total),
        )
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for path, apart in done.distances.items():
        print(f"{path}: {apart:.2%} from the original")
    print(f"{done.path}: {human_bytes(done.bytes)}, {arguments.format}")


def _plan(arguments) -> None:
    from . import budget, checkpoint
    from .console import table
    from .sizes import latent_shape, parse_size

    model, format = budget.PUBLISHED[arguments.model], arguments.format or "int8_block"
    if arguments.dit:
        found = checkpoint.inspect(arguments.dit)
        stored = found.format if found.format in FORMATS else "bf16"
        model, format = budget.model_of(found), arguments.format or stored
    if arguments.experts:
        model = model._replace(experts=arguments.experts)
    trained = 0.1 if model.has_sla and not arguments.dense else None
    topk = trained if arguments.topk is None else arguments.topk
    width, height = parse_size(arguments.size)
    frames, gib = arguments.frames, budget.GIB
    for memory in budget.CARDS if arguments.memory is None else [arguments.memory]:
        stages = budget.plan(model, width, height, frames, memory, format, topk, arguments.precision)
        rows = [
            (stage.name, f"{stage.weights / gib:.1f} + {stage.activations / gib:.1f} GiB", stage.verdict)
            for stage in stages
        ]
        table(f"{memory:g} GiB: {width}x{height}, {frames} frames, {format}", rows)
    tokens = math.prod(latent_shape(width, height, frames)) // 4
    linears = format if format in FORMATS[:2] else "float"
    total, moment, living = budget.step_peak(model, tokens, linears, topk, arguments.precision)
    rows = [(name, f"{size / gib:.2f} GiB") for name, size in living.items()]
    table(f"Sampling beside the weights, {tokens} tokens, {moment}: {total / gib:.2f} GiB", rows)
    print(
        "Weights + activations, computed from shapes: a forecast, not a measurement. ComfyUI takes about as much at "
        "most, and offloads by itself; turbo-core generate does not offload."
    )


def _doctor(arguments) -> None:
    from .console import table
    from .doctor import examine

    findings = examine()
    if arguments.json:
        print(json.dumps(findings, indent=2))
        return
    for section, rows in findings.items():
        table(section, rows)


def _make_tiny(arguments) -> None:
    from .console import human_bytes
    from .tiny_family import make_tiny, make_tiny_for_comfyui

    make = make_tiny_for_comfyui if arguments.comfyui else make_tiny
    make(arguments.folder, arguments.seed, lambda path: print(f"{path}: {human_bytes(path.stat().st_size)}"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="turbo-core", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=__version__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", parents=[common], help="prompt (and image) to video"))

    command = commands.add_parser("inspect", parents=[common], help="what a checkpoint holds")
    command.add_argument("files", nargs="+", type=Path, metavar="FILE")
    command.set_defaults(run=_inspect)

    command = commands.add_parser("convert", parents=[common], help="any checkpoint to safetensors")
    command.add_argument("--format", choices=FORMATS, required=True)
    _add_source_and_target(command)

    command = commands.add_parser("quantize", parents=[common], help="a float checkpoint to int8")
    command.add_argument("--format", choices=FORMATS[:2], default=FORMATS[0], help="default %(default)s")
    _add_source_and_target(command)

    command = commands.add_parser("merge", parents=[common], help="an acceleration carried over to a finetune")
    command.add_argument("finetune", type=Path, metavar="FINETUNE", help="any finetune of the original, or rCM weights")
    command.add_argument("--base", type=Path, required=True, metavar="ORIGINAL", help="what all were trained from")
    command.add_argument(
        "--turbo", type=Path, action="append", required=True, metavar="TURBOWAN", help="TurboWan or SLA; repeatable"
    )
    command.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.safetensors")
    command.add_argument("--strength", type=float, action="append", help="one for all or one each; default 1.0")
    command.add_argument("--format", choices=FORMATS, default="bf16", help="default %(default)s")
    command.set_defaults(run=_merge)

    _add_plan(commands.add_parser("plan", parents=[common], help="what a video needs on cards of 8 to 32 GiB"))

    command = commands.add_parser("doctor", parents=[common], help="what this machine can run, and why not")
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=_doctor)

    command = commands.add_parser("make-tiny", parents=[common], help="a complete small model family for tests")
    command.add_argument("folder", type=Path, metavar="DIR")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--comfyui", action="store_true", help="DIR is the models folder of a ComfyUI")
    command.set_defaults(run=_make_tiny)
    return parser


def _add_source_and_target(command) -> None:
    command.add_argument("source", type=Path, metavar="SRC")
    command.add_argument("target", type=Path, metavar="DST")
    command.set_defaults(run=_convert)


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
    add("--precision", choices=("bf16", "int8"), default="bf16", help="of sparse attention; default %(default)s")
    command.set_defaults(run=_plan)


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
    add("--precision", choices=("bf16", "int8"), default="bf16", help="of sparse attention; default %(default)s")
    add("--ode", action="store_true", help="deterministic steps: sharper, less robust")
    add("--boundary", type=float, default=0.9, help="sigma of the hand-over between experts; default %(default)s")
    add("--device", help="cuda, cuda:1, mps, cpu; default the best there is")
    add("--dtype", choices=DTYPES, help="default bfloat16, on a CPU float32")
    add("--noise-device", default="cpu", help="cpu (default) gives the same video on every machine")
    add("--tiled", action="store_true", help="decode in tiles: less memory")
    command.set_defaults(run=_generate)
