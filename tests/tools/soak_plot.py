"""A plot of resident memory over runs."""

from turbo_core.diagnostics import charts


def plot(path, values, warm_up, marked):
    """Write a PNG: values [MB] over run number, the warm-up shaded, marked runs as dots. The axis begins at zero."""
    step = 250 if max(values) > 1000 else 100
    ticks = list(range(0, int(max(values) * 1.05) // step * step + step + 1, step))
    runs = ("run", list(range(0, len(values) + 1, max(1, len(values) // 8))))
    points = list(enumerate(values))
    line = charts.curve(
        "Resident memory of the ComfyUI process after each run, MB",
        [(points, charts.LINE, 2)],
        runs,
        ticks,
        shaded=(0, warm_up),
        marked=[points[number] for number in marked],
        note="red: interrupted   grey: warm-up",
    )
    charts.save(charts.sheet("turbo-core soak", [f"{len(values)} runs"], [line]), path)
