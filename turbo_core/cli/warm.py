"""The verb warm of turbo-core: kernels compiled before somebody waits for them."""

import time
from pathlib import Path

from ..errors import TurboError
from .generate import PRECISIONS


def add_verbs(verbs, common) -> None:
    """Add warm to the parser's verbs; common: the parent parser with what all verbs take."""
    command = verbs.add_parser("warm", parents=[common], help="compile the kernels of a card ahead, in parallel")
    add = command.add_argument
    add("dit", type=Path, nargs="*", metavar="DIT", help="W8A8 checkpoints whose own launches are compiled too")
    add("--target", metavar="sm_NN", help="a card that need not be here; default the one that is")
    add("--size", default="832x480", help="of the videos: WIDTHxHEIGHT, 480p, 720p-9:16 ...; default %(default)s")
    add("--frames", type=int, default=81, help="4n + 1; default %(default)s")
    add("--precision", choices=PRECISIONS, default="bf16", help="of sparse attention; default %(default)s")
    add("--jobs", type=int, metavar="N", help="processes; default one a core, at most 8")
    command.set_defaults(run=run_warm)


def run_warm(arguments) -> int:
    from .. import checkpoint
    from ..diagnostics import warm
    from ..pipeline.sizes import latent_shape, parse_size
    from .console import progress_bars, table

    if arguments.jobs is not None and arguments.jobs < 1:
        raise TurboError(f"--jobs is above 0, got {arguments.jobs}.")
    latent = latent_shape(*parse_size(arguments.size), arguments.frames)
    videos = [warm.video_of(checkpoint.inspect(path), latent, arguments.precision) for path in arguments.dit]
    target, card = warm.target_of(arguments.target)
    start = time.perf_counter()
    with progress_bars() as progress:
        found = warm.warm(target, card, videos, arguments.jobs, progress)
    failed = [one for one in found if "failed" in one]
    kernels = len({one["hash"] for one in found if "hash" in one})
    rows = [
        ("for", card or f"{target[0]} {target[1]}"),
        ("kernels", str(kernels)),
        ("seconds", f"{time.perf_counter() - start:.1f}, of which one process alone would take"
         f" {sum(one['seconds'] for one in found):.1f} to compile"),
    ]  # fmt: skip
    rows += [(one["kernel"], one["failed"]) for one in failed]
    table("Compiled into Triton's cache", rows)
    return int(bool(failed))
