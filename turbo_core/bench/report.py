"""What a benchmark found: a table in the terminal, Markdown for a page, JSON for machines."""

import json
from pathlib import Path

from ..errors import TurboError
from ..files import written_aside

SCHEMA = 1
HEADER = ("contender", "ms", "p10-p90", "rate", "of machine", "x base", "error")
NARROW = (0, 1, 4, 5, 6)  # columns of a terminal of less than WIDE letters
WIDE = 116


def describe(machine: dict) -> str:
    """One line: the device, its versions and the date."""
    versions = machine["versions"]
    parts = [machine["name"], f"torch {versions['torch']}"]
    parts += [f"{name} {versions[name]}" for name in ("triton", "triton-windows") if name in versions]
    if machine["device"] == "cuda":
        parts += [machine["runtime"], f"driver {machine['driver']}"]
    else:
        threads = machine["threads"]
        parts.append(f"{threads} thread{'s' * (threads > 1)}, {machine['isa']}")
    return ", ".join([*parts, machine["date"][:10]])


def rate(found: dict, unit: str) -> str:
    """A rate in words: {"tflops": 0.0185} is 18.5 GFLOP/s."""
    large, small = {"gb_s": ("GB/s", "MB/s"), "tflops": ("TFLOP/s", "GFLOP/s")}[unit]
    return f"{found[unit]:.3g} {large}" if found[unit] >= 1 else f"{1e3 * found[unit]:.3g} {small}"


def cells(row: dict) -> tuple[str, ...]:
    """A timed row of measure() as text, in the order of HEADER."""
    told, share = "", ""
    for unit, of in (("gb_s", "of_copy"), ("tflops", "of_matmul")):
        if row.get(unit):
            told, share = rate(row, unit), f"{row[of]:.0%}" if of in row else ""
    speedup = f"{row['speedup']:.2f}" if "speedup" in row else ""
    error = "" if row.get("error") is None else f"{row['error']:.1e}"
    return row["name"], f"{row['ms']:.4g}", f"{row['p10']:.3g}-{row['p90']:.3g}", told, share, speedup, error


def remarks(case: dict) -> list[str]:
    """What stands below the table of a case: who has no time and why, and what is to be known of those who have."""
    lines, alike = list(case["notes"]), {}
    for row in case["rows"]:
        if "ms" not in row:
            alike.setdefault((row["status"], row["reason"]), []).append(row["name"])
        elif row["note"]:
            alike.setdefault(("note", row["note"]), []).append(row["name"])
        if "compile" in row["name"] and "first_s" in row:
            lines.append(f"{row['name']}: first run, with compilation, {row['first_s']:.1f} s")
    lines += [f"{kind}: {'; '.join(names)}: {reason}" for (kind, reason), names in alike.items()]
    return lines + [f"{name}: {_range(value)}" for name, value in case["clocks"].items()]


def _range(value):
    return value if isinstance(value, str) else "{:g}, {:g}, {:g} (least, median, largest)".format(*value)


def show(case: dict) -> None:
    """Print one case as a table on stdout."""
    rows = [cells(row) for row in case["rows"] if "ms" in row]
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        widths = [max(len(row[i]) for row in [HEADER, *rows]) for i in range(len(HEADER))]
        print(case["name"])
        for row in [HEADER, *rows]:
            texts = [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:]))]
            print("  " + "  ".join(texts))
    else:
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDE)
        columns = range(len(HEADER)) if console.width >= WIDE else NARROW
        grid = Table(title=case["name"], title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        for i in columns:
            grid.add_column(HEADER[i], justify="right" if i else "left", no_wrap=i > 0)
        for row in rows:
            grid.add_row(*(Text(row[i]) for i in columns))
        console.print(grid)
    for line in remarks(case):
        print("  " + line)
    print()


def markdown(report: dict) -> str:
    """The report as a page: one table for each case, its device and date above."""
    lines = [f"# {report['group']}: {describe(report['machine'])}", "", *(f"{note}." for note in report["notes"])]
    for case in report["cases"]:
        lines += ["", f"## {case['name']}", "", "| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"]
        rows = [cells(row) for row in case["rows"] if "ms" in row]
        lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
        lines += ["", *(f"* {line}" for line in remarks(case))]
    return "\n".join(lines) + "\n"


def write(path: Path, content: bytes) -> None:
    """Write a file of a report whole or not at all, and its folder where there is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            aside.write_bytes(content)
    except OSError as error:
        raise TurboError(f"{path} could not be written ({error}). Check the folder and its rights.") from error


def save(report: dict, folder: Path, picture: bytes | None = None) -> list[Path]:
    """Write <group>.json, <group>.md and, where there is a picture, <group>.png to a folder; returns what was
    written."""
    files = {"json": (json.dumps(report, indent=1) + "\n").encode(), "md": markdown(report).encode(), "png": picture}
    paths = {folder / f"{report['group']}.{suffix}": content for suffix, content in files.items() if content}
    for path, content in paths.items():
        write(path, content)
    return list(paths)
