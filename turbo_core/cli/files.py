"""The verbs of turbo-core for files: inspect, convert, quantize, merge, and tinywan, which copies the small family."""

import os
import sys
from pathlib import Path

# as in checkpoint.formats, which needs torch: --help does not wait for it
FORMATS = ("int8_block", "int8_row", "bf16", "fp16", "fp32", "fp8")
_FORCE = "write over a file that is there, without asking"


def add_verbs(verbs, common) -> None:
    """Add these verbs to the parser's; common: the parent parser with what all verbs take."""
    command = verbs.add_parser(
        "inspect", parents=[common], help="what models, text encoders, VAEs, LoRAs and videos are"
    )
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
    command.add_argument("--force", action="store_true", help=_FORCE)
    command.set_defaults(run=run_merge)

    command = verbs.add_parser("tinywan", parents=[common], help="TinyWan, a small trained family, into a ComfyUI")
    command.add_argument("models", type=Path, metavar="MODELS", help="ComfyUI's models folder")
    command.add_argument("--force", action="store_true", help="copy into any folder, one that holds no models too")
    command.set_defaults(run=run_tinywan)


def _add_source_and_target(command) -> None:
    command.add_argument("source", type=Path, metavar="SRC")
    command.add_argument("target", type=Path, metavar="DST")
    command.add_argument("--force", action="store_true", help=_FORCE)
    command.set_defaults(run=run_convert)


def run_inspect(arguments) -> int:
    """A table of each file. The first that cannot be read does not keep the others from being told of."""
    from ..errors import TurboError
    from .console import table
    from .inspecting import rows_of

    failed = []
    for path in arguments.files:
        try:
            table(str(path), rows_of(path))
        except TurboError as error:
            failed.append(error)
            if len(arguments.files) > 1:
                print(f"turbo-core: {error}", file=sys.stderr)
    if len(arguments.files) == 1 and failed:
        raise failed[0]
    return 2 if failed else 0


def run_convert(arguments) -> None:
    """convert and quantize."""
    from .. import checkpoint
    from ..files import human_bytes
    from .console import progress_bars

    _check_target(arguments)
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

    _check_target(arguments)
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


def _check_target(arguments) -> None:
    """Ask before a file is overwritten, or raise TurboError where nobody can be asked."""
    from ..errors import TurboError

    target = arguments.output if arguments.command == "merge" else arguments.target
    if arguments.force or not os.path.isfile(target):
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise TurboError(f"{target} is there already. Choose another name, or --force to write over it.")
    print(f"{target} is there already. Write over it? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise TurboError(f"{target} stays as it is.")


def _warn(warnings: list[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def run_tinywan(arguments) -> None:
    from ..errors import TurboError
    from ..files import human_bytes
    from ..tinywan import install

    kinds = "checkpoints", "diffusion_models", "unet", "text_encoders", "clip", "vae", "loras"
    models = arguments.models
    if os.path.isdir(models) and not arguments.force and not any((models / kind).is_dir() for kind in kinds):
        raise TurboError(
            f"{models} is no models folder of a ComfyUI: expected folders such as diffusion_models or vae in it. Give "
            "that folder, or --force to copy there anyway."
        )
    install(arguments.models, lambda path: print(f"{path}: {human_bytes(path.stat().st_size)}"))
