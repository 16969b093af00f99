"""Draws models/tinywan/curves.png: how each number fell or rose over all stages of a training of TinyWan.

    python -m tests.tools.record_curves FOLDER/work

Needs the work folder that `turbo-core train tiny FOLDER` left, with the checkpoints of its stages.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image

from turbo_core.diagnostics import charts
from turbo_core.errors import TurboError
from turbo_core.tinywan import FOLDER
from turbo_core.train.engine import CHECKPOINT

# (what it is, its name in the history, names of the stages without their numbers); one drawing each
CURVES = (
    ("VAE, dB; decoder alone, dB", "psnr", ("vae", "decoder")),
    ("teacher, loss", "loss", ("teacher",)),
    ("student, loss of consistency", "consistency", ("distill",)),
    ("student, loss of the fake score", "fake", ("distill",)),
    ("sparse, error as a share of the dense velocity's power", "relative", ("sparsify",)),
    ("image to video, teacher, loss", "loss", ("pair-teacher",)),
    ("image to video, student, loss of consistency", "consistency", ("pair-distill",)),
    ("image to video, sparse, error as a share", "relative", ("pair-sparsify",)),
)


def histories(work: Path, stage: str) -> list[list[dict]]:
    """Of a stage's parts, in order."""
    folders = sorted(
        path.parent for path in work.glob(f"*/{CHECKPOINT}") if path.parent.name.rstrip("0123456789") == stage
    )
    if not folders:
        raise TurboError(f"{work} has no checkpoint of {stage}: name the work folder of a whole training.")
    kept = [torch.load(path / CHECKPOINT, map_location="cpu", weights_only=True)["history"] for path in folders]
    return [json.loads(bytes(part.numpy())) if torch.is_tensor(part) else part for part in kept]


def record(work: Path) -> None:
    drawn = []
    for title, name, stages in CURVES:
        parts = [part for stage in stages for part in histories(work, stage)]
        ends = " + ".join(str(len(part)) for part in parts)
        drawn.append(charts.history(f"{title}: {ends} steps", [{name: step[name]} for part in parts for step in part]))
    rows = []
    for left, right in zip(drawn[::2], drawn[1::2], strict=True):
        rows.append(Image.new("RGB", (left.width + right.width, max(left.height, right.height)), "white"))
        rows[-1].paste(left, (0, 0))
        rows[-1].paste(right, (left.width, 0))
    sheet = charts.sheet("TinyWan: what each stage learnt", ["pale: each step; dark: its moving average"], rows)
    charts.save(sheet, FOLDER / "curves.png")


if __name__ == "__main__":
    record(Path(sys.argv[1]))
