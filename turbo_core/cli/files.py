"""What each command of turbo-core does with its arguments: the libraries come in when they are used."""

import sys
from pathlib import Path


def inspect(arguments) -> None:
    from .. import checkpoint
    from ..files import human_bytes
    from .console import table

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


def convert(arguments) -> None:
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
    for warning in done.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{arguments.target}: {human_bytes(Path(arguments.target).stat().st_size)}, {arguments.format}")


def merge(arguments) -> None:
    from ..checkpoint.merging import merge as merge_files
    from ..files import human_bytes
    from .console import progress_bars

    with progress_bars() as progress:
        done = merge_files(
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


def make_tiny(arguments) -> None:
    from ...tests.helpers.tiny_family import make_tiny

    make_tiny(arguments.folder, arguments.seed, _say_file)


def install_tinywan(arguments) -> None:
    from ..tinywan import install

    install(arguments.models, _say_file)


def _say_file(path: Path) -> None:
    from ..files import human_bytes

    print(f"{path}: {human_bytes(path.stat().st_size)}")


# as in formats and sla, which need torch: --help does not wait for it
FORMATS = ("int8_block", "int8_row", "bf16", "fp16", "fp32", "fp8")


def _add_source_and_target(command) -> None:
    command.add_argument("source", type=Path, metavar="SRC")
    command.add_argument("target", type=Path, metavar="DST")
    command.set_defaults(run=convert)
