"""Measures what a short batch does not show: memory from clip 10 on, and actors beside one when their start is over.

    OMP_NUM_THREADS=1 python -m tests.tools.measure_long_batch benchmarks/results/cpu [--part memory|speed]

For a machine with two free cores; takes ten minutes. Memory: one process makes 300 clips of 9 frames of 64 x 64; what
is resident is read when a clip is done, and a line through the means of batches of clips gives the slope's interval.
The next clip is sampled meanwhile, so that single readings differ: the means of 50 are compared too. Once with the C
library's arenas as they are, one for each thread, and once with one arena for all (MALLOC_ARENA_MAX=1). Speed: 64 clips
of 33 frames of 128 x 128 by one and by two processes, on Ray and by --workers, in the order 2, 1, 1, 2; from the first
clip that is done to the last, and start and all. Nothing stays and nothing overlaps there: each process has one core.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from tests.tools.leaks import slope
from tests.tools.measure_batch import ROOT, command, prompts, resident
from turbo_core.bench import machine

CLIPS, WARM, TOGETHER, SHARED = 300, 10, 50, 64


def memory(folder: Path, **variables) -> list[int]:
    """Bytes that are resident when each clip is done."""
    (folder / "memory.txt").write_text("\n".join(prompts(CLIPS)))
    out, sizes, environment = folder / f"memory{len(variables)}", [], os.environ | variables
    more = "--size", "64x64", "--frames", "9", "--steps", "2", "--no-cache"
    process = subprocess.Popen(
        command("batch", folder / "memory.txt", "-o", out) + [*more],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    while process.poll() is None:
        time.sleep(0.01)
        if (out / "batch.jsonl").exists():
            done = (out / "batch.jsonl").read_text().count('"state": "done"')
            if done > len(sizes):
                sizes += [resident(process.pid)] * (done - len(sizes))
    assert process.returncode == 0 and len(sizes) >= CLIPS - 2, "the last ones may be over before they are seen"
    return sizes


def by_processes(folder: Path, name: str, *options) -> dict[str, float]:
    """Seconds from the first clip that is done to the last, and in all."""
    (folder / "speed.txt").write_text("\n".join(prompts(SHARED)))
    out, began = folder / name, time.perf_counter()
    run = command("batch", folder / "speed.txt", "-o", out, "--no-cache", "--memory", 0, *options)
    subprocess.run(run, cwd=ROOT, check=True, capture_output=True)
    took = time.perf_counter() - began
    ends = sorted(path.stat().st_mtime for path in out.glob("*.mp4"))
    assert len(ends) == SHARED
    return {"between": ends[-1] - ends[0], "all": took}


def speed(folder: Path) -> dict:
    rows = {}
    for way, options in {"Ray": ["--ray"], "--workers": []}.items():
        for turn, count in enumerate((2, 1, 1, 2)):
            found = by_processes(folder, f"{len(rows)}-{turn}-{count}", *options, "--workers", count)
            print(way, count, found, flush=True)
            rows.setdefault(way, {}).setdefault(str(count), []).append(found)
    return rows


def about_memory(sizes: list[int]) -> dict:
    rise, half = slope(sizes[WARM:])
    first, last = (statistics.mean(part) for part in (sizes[WARM : WARM + TOGETHER], sizes[-TOGETHER:]))
    return {
        "clips": len(sizes), "after clip 10": sizes[WARM], "highest after": max(sizes[WARM:]),
        "growth of the means": last / first - 1, "bytes a clip": rise, "interval of 95 %": [rise - half, rise + half],
        "resident": sizes,
    }  # fmt: skip


def lines(report) -> list[str]:
    rows = []
    for arenas, found in report.get("memory", {}).items():
        low, high = found["interval of 95 %"]
        grown = found["growth of the means"]
        rows += [
            (
                f"memory after clip 10, {arenas}",
                f"{found['after clip 10'] / 1e6:.0f} MB",
                f"{found['clips']} clips, one process",
            ),
            (f"mean of the last {TOGETHER} over that of the first", f"{grown:+.2%}", "asked: under 1 %"),
            ("slope", f"{found['bytes a clip'] / 1e3:+.1f} kB a clip", f"95 %: {low / 1e3:+.1f} to {high / 1e3:+.1f}"),
            ("highest reading", f"{found['highest after'] / found['after clip 10'] - 1:+.2%}", "of clip 10"),
        ]
    for way, counts in report.get("speed", {}).items():
        for part, what in (("between", "first clip done to the last"), ("all", "start and all")):
            one, two = (statistics.mean(run[part] for run in counts[count]) for count in ("1", "2"))
            rows.append((f"{way}, two processes, {what}", f"{one / two:.2f} x one", f"{two:.1f} and {one:.1f} s"))
    return ["| | | |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows)]


def main(target: Path, part: str | None) -> None:
    report = {"what": __doc__.splitlines()[0], "machine": machine.facts(torch.device("cpu"))}
    with tempfile.TemporaryDirectory() as scratch:
        if part in (None, "memory"):
            arenas = {"arenas as they are": {}, "one arena": {"MALLOC_ARENA_MAX": "1"}}
            report["memory"] = {
                name: about_memory(memory(Path(scratch), **variables)) for name, variables in arenas.items()
            }
        if part in (None, "speed"):
            report["speed"] = speed(Path(scratch))
    text = [f"# {report['what']}", "", __doc__.split("\n\n")[2].strip(), "", *lines(report), ""]
    text += [f"{key}: {value}" for key, value in report["machine"].items() if isinstance(value, str)]
    target.mkdir(parents=True, exist_ok=True)
    (target / "long_batch.json").write_text(json.dumps(report, indent=1) + "\n")
    (target / "long_batch.md").write_text("\n".join(text) + "\n")
    print("\n".join(lines(report)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("target", type=Path)
    parser.add_argument("--part", choices=("memory", "speed"))
    main(**vars(parser.parse_args()))
