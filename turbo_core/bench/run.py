"""A whole benchmark: the machine's own rates, then the cases of each group, shown as they come and kept in files."""

import contextlib
import json
from pathlib import Path

import torch

from ..diagnostics import charts
from ..errors import TurboError, quoted
from ..selfcheck import prove
from . import attention, block, harness, linear, machine, streaming, vae
from .report import SCHEMA, describe, rate, save, show, write

GROUPS = {
    "linear": (linear, 3),  # how many numbers its shapes have
    "streaming": (streaming, 2),
    "attention": (attention, 4),
    "block": (block, 2),
    "vae": (vae, 5),
}
FORMS = {"linear": "MxNxK", "streaming": "MxK", "attention": "BxHxLxD", "block": "LxDIM", "vae": "BxDIMxTxHxW"}


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
            raise TurboError(f"--shapes takes {expected}; got {quoted(text)}")
        for name in fitting:
            found[name].append(shape)
    return found


def run(groups, device, out: Path, sizes=None, quick=False, seconds=harness.SECONDS, tell=print, status=None) -> dict:
    """Measure groups on a device and write their files to out/<machine>/. Returns {group: report}.

    sizes: {group: shapes}; a group without is measured at its own, or left out where only others were given.
    tell: called with the path of each file written. status: called with what is being done. A group's files are
    replaced when it is complete; until then its finished cases are in <group>.partial.json, so that an interrupted
    run loses nothing.
    """
    device = torch.device(device)
    prove(device)
    clock = harness.clock_of(device)
    repeats, seconds = (5, 0.2) if quick else (harness.REPEATS, seconds)
    notes = [f"times are {clock.name}"] if isinstance(clock, harness.ThreadClock) else []
    facts, folder = machine.facts(device), out / machine.slug(device)

    def timed(case, limits):
        if status:
            status(f"{case.name}: first runs")
        tick = status and (lambda done, total: status(f"{case.name}: round {done} of {total}"))
        measured = harness.measure(case, clock, limits, repeats, seconds, tick, machine.watch(device), report_long)
        if status:
            status("")
        return measured

    def report_long(row):
        """A line at once for what takes long: the table of its case comes minutes later."""
        if row.get("first_s", 0) > harness.LONG:
            error = "" if row.get("error") is None else f", error {row['error']:.1e}"
            print(f"  {row['name']}: first run {row['first_s']:.1f} s{error}", flush=True)

    def rates():
        measured = timed(machine.limits_case(device, quick), {})
        return measured, machine.limits(measured)

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
            "machine": facts,
            "settings": {"repeats": repeats, "seconds": seconds, "quick": quick, "clock": clock.name},
            "limits": limits,
            "notes": notes + [note for note in (machine.busy(facts),) if note],
            "cases": [first],
        }
        partial = folder / f"{group}.partial.json"
        for make in GROUPS[group][0].cases(device, given, quick):
            case = None  # the operands of the one before go first
            clock.release()
            try:
                case = make()
            except Exception as error:  # out of memory, or a kernel's: the other cases go on
                report["notes"].append(f"a case was left out: {harness.in_short(error)}")
                print(report["notes"][-1])
                continue
            measured = timed(case, limits)
            more = GROUPS[group][0].derived(measured) if hasattr(GROUPS[group][0], "derived") else None
            for one in filter(None, (measured, more)):
                show(one)
                report["cases"].append(one)
            write(partial, json.dumps(report, indent=1).encode())
        report["limits_after"] = rates()[1]
        for path in save(report, folder, picture(report)):
            tell(str(path))
        with contextlib.suppress(OSError):
            partial.unlink()
        reports[group] = report
    return reports


def picture(report: dict) -> bytes | None:
    """The PNG of a report: one group of bars for each case, how many times as fast as its baseline, which stands at
    the line. None without Pillow or a time; parts of a contender are left to the table."""
    shown = [(case, [row for row in case["rows"] if _is_bar(row)]) for case in report["cases"][1:]]
    shown = [(case, rows) for case, rows in shown if rows]
    if not shown or not charts.available():
        return None
    limits = report["limits"]
    units = {"copy": "gb_s", "product": "tflops"}
    rates = [f"{name} {rate(limits, unit)}" for name, unit in units.items() if unit in limits]
    lines = [describe(report["machine"]), "; ".join([*rates, *report["notes"]])]
    parts = [_bars(case["name"], rows, case["baseline"]) for case, rows in shown]
    return charts.png(charts.sheet(f"turbo-core bench {report['group']}", lines, parts), colours=64)


def _is_bar(row):
    return "speedup" in row and not (row["alone"] and row["error"] is None)


def _bars(name, rows, baseline):
    longest, bars = max(row["speedup"] for row in rows), []
    for row in rows:
        colour = charts.OURS if "turbo-core" in row["name"] else charts.OTHERS
        colour = charts.BASE if row["name"] == baseline else colour
        error = f"   error {row['error']:.0e}" if row.get("error") else ""
        text = f"{row['speedup']:.2f}x   {row['ms']:.4g} ms{error}"
        bars.append(charts.Bar(row["name"], row["speedup"] / longest, text, colour))
    return charts.bars(name, bars, line=1 / longest)
