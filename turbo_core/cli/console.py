"""What the command line shows: progress bars and tables with rich, plain lines where it is not installed."""

import sys
from contextlib import contextmanager


@contextmanager
def progress_bars(remaining: bool = False):
    """A callback (stage, done, total) that draws one bar a stage on stderr; remaining: with the time that is left."""
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        yield _plain_progress
        return
    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        TaskProgressColumn("{task.fields[count]:>6}"),
        TimeElapsedColumn(),
        *([TimeRemainingColumn()] if remaining else []),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def show(stage: str, done: int, total: int):
            count = f"{done}/{total}" if 1 < total < 1000 else f"{100 * done // max(total, 1)}%"
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, count=count)
            bars.update(tasks[stage], completed=done, total=total, count=count)

        yield show


def _plain_progress(stage: str, done: int, total: int):
    if total < 1000:
        print(f"{stage} {done}/{total}", file=sys.stderr)
    elif done == total:
        print(f"{stage} done", file=sys.stderr)


def table(title: str, rows: list[tuple]) -> None:
    """Print rows of text under a title on stdout."""
    rows = [tuple(str(cell) for cell in row) for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(title)
        width = max(len(row[0]) for row in rows)
        for first, *rest in rows:
            print(f"  {first:<{width}}  {'  '.join(rest)}")
        return
    grid = Table(title=title, title_justify="left", show_header=False)
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))  # Text: brackets in a prompt are not markup
    Console().print(grid)
