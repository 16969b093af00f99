"""A whole benchmark: the machine's own rates, then the cases of each group, shown as they come and kept in files."""

import contextlib
import json
from pathlib import Path

import torch

from . import bench, bench_attention, bench_block, bench_linear, bench_machine, bench_streaming
from .bench_report import SCHEMA, save, show, write
from .errors import TurboError

GROUPS = {
    "linear": (bench_linear, 3),  # how many numbers its shapes have
    "streaming": (bench_streaming, 2),
    "attention": (bench_attention, 4),
    "block": (bench_block, 2),
}
FORMS = {"linear": "MxNxK", "streaming": "MxK", "attention": "BxHxLxD", "block": "LxDIM"}


def parse_shapes(texts: list[str], groups) -> dict[str, list[tuple[int, ...]]]:
    """{group: shapes} of texts such as 1024x1536x1536; how many numbers one has says which groups it is for."""
    found = {name: [] for name in groups}
    for text in texts:
        try:
            shape = tuple(int(part) for part in text.lower().split("x"))
        except ValueError:
            shape = ()
        fitting = [name for name in groups if GROUPS[name][1] == len(shape)]
        if not fitting or min(shape) < 1:
            expected = ", ".join(f"{FORMS[name]} for {name}" for name in groups)
            raise TurboError(f"--shapes takes {expected}; got {text!r}")
        for name in fitting:
            found[name].append(shape)
    return found


def run(groups, device, out: Path, sizes=None, quick=False, seconds=bench.SECONDS, tell=print, status=None) -> dict:
    """Measure groups on a device and write their files to out/<machine>/. Returns {group: report}.

    sizes: {group: shapes}; a group without is measured at its own, or left out where only others were given.
    tell: called with the path of each file written. status: called with what is being done. A group's files are
    replaced when it is complete; until then its finished cases are in <group>.partial.json, so that an interrupted
    run loses nothing.
    """
    device = torch.device(device)
    clock = bench.clock_of(device)
    repeats, seconds = (5, 0.2) if quick else (bench.REPEATS, seconds)
    notes = [f"times are {clock.name}"] if isinstance(clock, bench.ThreadClock) else []
    machine, folder = bench_machine.facts(device), out / bench_machine.slug(device)

    def timed(case, limits):
        if status:
            status(f"{case.name}: first runs")
        tick = status and (lambda done, total: status(f"{case.name}: round {done} of {total}"))
        measured = bench.measure(case, clock, limits, repeats, seconds, tick, bench_machine.watch(device))
        if status:
            status("")
        return measured

    def rates():
        measured = timed(bench_machine.limits_case(device, quick), {})
        return measured, bench_machine.limits(measured)

    first, limits = rates()
    show(first)
    reports = {}
    for group in groups:
        given = (sizes or {}).get(group)
        if sizes and not given:
            continue
        report = {
            "schema": SCHEMA,
            "group": group,
            "machine": machine,
            "settings": {"repeats": repeats, "seconds": seconds, "quick": quick, "clock": clock.name},
            "limits": limits,
            "notes": notes + [note for note in (bench_machine.busy(machine),) if note],
            "cases": [first],
        }
        partial = folder / f"{group}.partial.json"
        for make in GROUPS[group][0].cases(device, given, quick):
            clock.release()
            try:
                case = make()
            except Exception as error:  # out of memory, or a kernel's: the other cases go on
                report["notes"].append(f"a case was left out: {bench.in_short(error)}")
                print(report["notes"][-1])
                continue
            measured = timed(case, limits)
            show(measured)
            report["cases"].append(measured)
            write(partial, json.dumps(report, indent=1).encode())
        report["limits_after"] = rates()[1]
        for path in save(report, folder):
            tell(str(path))
        with contextlib.suppress(OSError):
            partial.unlink()
        reports[group] = report
    return reports
