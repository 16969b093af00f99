"""The verbs of turbo-core for files: inspect, convert, quantize, merge, and tinywan, which copies the small family."""

import sys
from pathlib import Path

# as in checkpoint.formats, which needs torch: --help does not wait for it
FORMATS = ("int8_block", "int8_row", "bf16", "fp16", "fp32", "fp8")


def add_verbs(verbs, common) -> None:
    """Add these verbs to the parser's; common: the parent parser with what all verbs take."""
    command = verbs.add_parser("inspect", parents=[common], help="what a checkpoint holds, or how a video was made")
    command.add_argument("files", nargs="+", type=Path, metavar="FILE")
    command.set_defaults(run=run_inspect)

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
    command.set_defaults(run=run_merge)

    command = verbs.add_parser("tinywan", parents=[common], help="TinyWan, a small trained family, into a ComfyUI")
    command.add_argument("models", type=Path, metavar="MODELS", help="ComfyUI's models folder")
    command.add_argument("--force", action="store_true", help="copy into any folder, one that holds no models too")
    command.set_defaults(run=run_tinywan)


def _add_source_and_target(command) -> None:
    command.add_argument("source", type=Path, metavar="SRC")
    command.add_argument("target", type=Path, metavar="DST")
    command.set_defaults(run=run_convert)


def run_inspect(arguments) -> None:
    from .. import checkpoint
    from ..errors import shown
    from ..files import human_bytes
    from ..pipeline.video import VIDEO_SUFFIXES
    from .console import table

    for path in arguments.files:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            table(str(path), _of_video(path))
            continue
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
                *(("metadata", f"{shown(key)} = {shown(value)}") for key, value in found.metadata.items()),
                *(("note", note) for note in found.notes),
            ],
        )


def _of_video(path) -> list[tuple[str, str]]:
    from ..errors import shown
    from ..pipeline.provenance import credentials
    from ..pipeline.video import read_made

    made, signed = read_made(path), credentials(path)
    rows = [(shown(key), shown(value, 400)) for key, value in (made or {}).items()]
    rows += [(f"content credentials: {key}", shown(value, 200)) for key, value in (signed or {}).items()]
    return rows or [("made by", "not known: no settings and no content credentials that can be read here")]


def run_convert(arguments) -> None:
    """convert and quantize."""
    from .. import checkpoint
    from ..files import human_bytes
    from .console import progress_bars

    write = checkpoint.quantize if arguments.command == "quantize" else checkpoint.convert
    with progress_bars() as progress:
        done = write(
            arguments.source,
            arguments.target,
            arguments.format,
            progress=lambda count, total: progress(arguments.command, count, total),
        )
    _warn(done.warnings)
    print(f"{done.path}: {human_bytes(done.bytes)}, {arguments.format}")


def run_merge(arguments) -> None:
    from .. import checkpoint
    from ..files import human_bytes
    from .console import progress_bars

    with progress_bars() as progress:
        done = checkpoint.merge(
            arguments.finetune,
            arguments.base,
            arguments.turbo,
            arguments.output,
            arguments.format,
            arguments.strength or 1.0,
            progress=lambda count, total: progress("merge", count, total),
        )
    _warn(done.warnings)
    for path, apart in done.distances.items():
        print(f"{path}: {apart:.2%} from the original")
    print(f"{done.path}: {human_bytes(done.bytes)}, {arguments.format}")


def _warn(warnings: list[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def run_tinywan(arguments) -> None:
    from ..errors import TurboError
    from ..files import human_bytes
    from ..tinywan import install

    kinds = "checkpoints", "diffusion_models", "unet", "text_encoders", "clip", "vae", "loras"
    models = arguments.models
    if models.is_dir() and not arguments.force and not any((models / kind).is_dir() for kind in kinds):
        raise TurboError(
            f"{models} is no models folder of a ComfyUI: expected folders such as diffusion_models or vae in it. Give "
            "that folder, or --force to copy there anyway."
        )
    install(arguments.models, lambda path: print(f"{path}: {human_bytes(path.stat().st_size)}"))
