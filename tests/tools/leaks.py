"""What a clip leaves in memory: `python -m tests.tools.leaks [--clips 300]`.

One process makes clips with TinyWan, of other prompts and seeds each time, and writes them; its resident memory is
read after each, on Linux. A line is fitted to the means of batches of clips, whose scatter gives the slope's interval
of 95 %. What 10,000 clips would leave is that slope times 10,000: a forecast, no measurement. Writes leaks.json to
benchmarks/results/cpu and exits with 1 where the whole interval lies above 0.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.helpers.comfyui import PACK
from turbo_core import tinywan
from turbo_core.pipeline import Pipeline, generate
from turbo_core.pipeline.video import write_video
from turbo_core.tinywan import world

RESULTS = PACK / "benchmarks" / "results" / "cpu"
WARM_UP, BATCHES = 60, 12
STUDENT = {1: 12.706, 2: 4.303, 4: 2.776, 6: 2.447, 8: 2.306, 10: 2.228, 14: 2.145, 18: 2.101}  # t at 97.5 %
FORECAST = 10_000  # clips


def slope(values, batches=BATCHES):
    """(slope a value, half of its 95 % interval) by least squares over the means of as many batches of the values."""
    size = len(values) // batches
    points = [(size * (n + 0.5), statistics.mean(values[n * size : (n + 1) * size])) for n in range(batches)]
    x, y = (statistics.mean(axis) for axis in zip(*points))
    spread = sum((a - x) ** 2 for a, _ in points)
    rise = sum((a - x) * (b - y) for a, b in points) / spread
    left = sum((b - y - rise * (a - x)) ** 2 for a, b in points) / (batches - 2)
    return rise, STUDENT[batches - 2] * math.sqrt(left / spread)


def clips(count, make, folder):
    """[bytes resident after each clip]."""
    resident = []
    for number in range(count):
        random = torch.Generator().manual_seed(number)
        prompt = world.caption(world.random_scenes(1, random)[0], number)
        result = make(prompt, size=(64, 64), frames=9, steps=1 + number % 2, seed=number, topk=(None, 0.3)[number % 2])
        write_video(folder / f"{number % 4}.mp4", result.frames)
        del result
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    return resident


def report(resident, warm_up, seconds):
    """The results of one way to make clips, as they go to leaks.json."""
    rise, half = slope(resident[warm_up:])
    return {
        "clips": len(resident),
        "warm_up": warm_up,
        "seconds": round(seconds, 1),
        "resident_mb_at_the_end": round(resident[-1] / 1e6, 1),
        "bytes_a_clip": round(rise, 1),
        "interval_of_95_percent": [round(rise - half, 1), round(rise + half, 1)],
        f"forecast_mb_after_{FORECAST}_clips": [
            round(FORECAST * value / 1e6, 1) for value in (rise - half, rise, rise + half)
        ],
        "after_each_clip_mb": [round(value / 1e6, 2) for value in resident],
    }


def main():
    parser = argparse.ArgumentParser(prog="leaks", description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=300)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for leaks.json")
    arguments = parser.parse_args()
    files = [tinywan.FOLDER / tinywan.FILES[name] for name in ("turbo", "vae", "text")]
    rows, warm_up = {}, min(WARM_UP, arguments.clips // 3)
    with tempfile.TemporaryDirectory() as folder, Pipeline(*files, device="cpu") as pipeline:
        ways = {
            "generate": lambda prompt, **settings: generate(prompt, *files, device="cpu", **settings),
            "Pipeline": pipeline,
        }
        for name, make in ways.items():
            began = time.monotonic()
            resident = clips(arguments.clips, make, Path(folder))
            rows[name] = report(resident, warm_up, time.monotonic() - began)
            print(name, {key: value for key, value in rows[name].items() if key != "after_each_clip_mb"}, flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "leaks.json").write_text(json.dumps(rows, indent=1) + "\n")
    leaks = [row for row in rows.values() if row["interval_of_95_percent"][0] > 0]
    return int(bool(leaks))


if __name__ == "__main__":
    sys.exit(main())
