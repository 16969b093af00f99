"""The verbs of turbo-core that measure this machine: bench and tune."""

import json
import sys
from pathlib import Path

from ..errors import TurboError

BENCHMARKS = ("linear", "streaming", "attention", "block", "vae")
CLIP = "clip"  # whole processes, not kernels: only where it is asked for


def add_verbs(verbs, common) -> None:
    """Add these verbs to the parser's; common: the parent parser with what all verbs take."""
    command = verbs.add_parser("bench", parents=[common], help="times and errors of the kernels on this machine")
    add = command.add_argument
    add(
        "what",
        nargs="*",
        choices=(*BENCHMARKS, CLIP, "all"),
        default="all",
        metavar="WHAT",
        help=f"{', '.join(BENCHMARKS)}; or {CLIP}: prompt to MP4, beside diffusers and the ComfyUI of COMFYUI_DIR",
    )
    add(
        "--shapes",
        nargs="+",
        default=[],
        metavar="AxB",
        help="MxK streaming, LxDIM block, MxNxK linear, BxHxLxD attention, BxDIMxTxHxW vae",
    )
    add("--quick", action="store_true", help="tiny shapes, nothing compiled: does it run?")
    add("--check", action="store_true", help="first hold every kernel to an oracle on awkward shapes")
    add("--seconds", type=float, default=2.0, help="for each contender, or 50 runs; default %(default)s")
    add("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR", help="default %(default)s")
    add("--device", help="cuda, cuda:1, mps, cpu; default the best there is")
    add("--threads", type=int, help="of a CPU; default as torch has it")
    command.set_defaults(run=run_bench)

    command = verbs.add_parser("tune", parents=[common], help="measure and keep this card's own launch parameters")
    command.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="default where turbo-core looks for it")
    command.add_argument("--device", help="cuda, cuda:1; default the best there is")
    command.set_defaults(run=run_tune)


def run_bench(arguments) -> int:
    import torch

    from ..bench import check, report, run
    from ..bench.machine import slug
    from ..devices import pick_device
    from ..heap import keep_freed_memory

    named = [arguments.what] if isinstance(arguments.what, str) else arguments.what
    groups = tuple(run.GROUPS) if "all" in named else tuple(name for name in dict.fromkeys(named) if name != CLIP)
    sizes = run.parse_shapes(arguments.shapes, groups) if arguments.shapes else None
    if arguments.seconds <= 0 or (arguments.threads or 1) < 1:
        raise TurboError(f"--seconds and --threads are above 0, got {arguments.seconds:g} and {arguments.threads}")
    device = pick_device(arguments.device)
    keep_freed_memory(device)  # as turbo-core generate does; for every contender
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    failed = CLIP in named and _bench_clip(device, arguments)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events and libraries go by the current one
    wrong = 0
    with torch.no_grad():
        if arguments.check:
            found = check.check(device, status=_status)
            _status("")
            wrong = sum(not one["ok"] for one in found)
            path = arguments.out / slug(device) / "check.json"
            report.write(path, (json.dumps(found, indent=1) + "\n").encode())
            print(f"check: {len(found) - wrong} of {len(found)} right; {path}")
        reports = (
            run.run(groups, device, arguments.out, sizes, arguments.quick, arguments.seconds, status=_status)
            if groups
            else {}
        )
    rows = [row for report in reports.values() for case in report["cases"] for row in case["rows"]]
    return int(wrong > 0 or failed or any(row["status"] == "wrong" and "turbo-core" in row["name"] for row in rows))


def _bench_clip(device, arguments) -> bool:
    """True where a way to a clip failed that is there."""
    from .. import tinywan
    from ..bench import clip

    files = {name: tinywan.FOLDER / file for name, file in tinywan.FILES.items()}
    report = clip.run(files, device, arguments.out, arguments.quick, status=_status)
    return any(row["status"] == "failed" for row in report["rows"])


def run_tune(arguments) -> None:
    from ..bench.tune import tune
    from ..devices import pick_device
    from .console import table

    found = tune(
        pick_device(arguments.device),
        progress=lambda done, total, text: _status(f"tune {done} of {total}: {text}"),
        out=arguments.output,
    )
    _status("")
    rows = [("product", "best", "as shipped")]
    rows += [(key, f"{us['best']:.0f} us", f"{us['shipped']:.0f} us") for key, us in found["microseconds"].items()]
    table(f"{found['card']}: {found['file']}", rows)


def _status(text: str) -> None:
    """One line on stderr that the next one overwrites, where somebody is looking."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
