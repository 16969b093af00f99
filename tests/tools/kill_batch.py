"""Kills a batch at random moments until it is done, and looks at what is there.

    OMP_NUM_THREADS=1 python -m tests.tools.kill_batch [--kills 20] [--seed 0]

Prints one line of JSON: kills, videos, those made twice, part files, unreadable videos, videos without settings beside
them. All but the first two must be 0.
"""

import argparse
import json
import random
import subprocess
import tempfile
import time
from pathlib import Path

from tests.helpers.manifests import times_done
from tests.tools.measure_batch import ROOT, command, frames, prompts

VIDEOS = 40


def main(kills: int, seed: int) -> None:
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        listed, out = Path(scratch) / "prompts.txt", Path(scratch) / "out"
        listed.write_text("\n".join(prompts(VIDEOS)))
        run = [*command("batch", listed, "-o", out, "--no-cache"), "--size", "64x64", "--frames", "9", "--steps", "2"]
        killed = 0
        while killed < kills:
            process = subprocess.Popen(run, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            begun = time.monotonic()
            before = len(list(out.glob("*.mp4")))
            # half of them while it starts and loads, half while it makes videos
            if killed % 2:
                while process.poll() is None and len(list(out.glob("*.mp4"))) == before:
                    time.sleep(0.01)
                time.sleep(moments.random())
            else:
                time.sleep(6 * moments.random())
            if process.poll() is not None:
                break
            process.kill()
            process.wait()
            killed += 1
            print(f"kill {killed}: after {time.monotonic() - begun:.1f} s, {len(list(out.glob('*.mp4')))} videos")
        subprocess.run(run, cwd=ROOT, check=True, capture_output=True)
        print(json.dumps(looked_at(out) | {"kills": killed}))


def looked_at(out: Path) -> dict:
    done = times_done(out)
    videos = list(out.glob("*.mp4"))
    return {
        "videos": len(videos),
        "made twice": sum(count > 1 for count in done.values()),
        "not entered": sum(not done[video.name] for video in videos),
        "part files": len(list(out.glob("*.part"))),
        "unreadable": sum(len(frames(video)) != 9 for video in videos),
        "without settings": sum(not video.with_suffix(".json").exists() for video in videos),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
