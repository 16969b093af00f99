"""The quality report as a table and as one picture: bars with their confidence intervals, and clips side by side."""

import math
from pathlib import Path

import torch

from ..diagnostics import charts
from ..pipeline.video import to_frames
from ..train import precision
from ..vae import decode_video, load_vae
from . import FILES, world
from .evaluate import BATCH
from .paired import compare
from .rows import ROWS, load_row, pictures, prompts, sample_row

_SHOWN = (
    "teacher, 50 steps, guidance 3",
    "rCM, 4 steps",
    "rCM, 1 step",
    "rCM 4 + SLA top-k 0.15",
    "rCM 4 + W8A8 block",
    "I2V, 4 steps, SLA top-k 0.15",
)
_FRAMES, _TILE = 5, 96  # of each clip, and how high


def table(report: list[dict]) -> list[tuple[str, ...]]:
    """The rows of a report as text, a heading first; every acceleration against what it accelerates, prompt by prompt
    where both rows tell which were true. dB: of clips that went through the VAE, and of the first frame against the
    picture that was given. CPU s/clip: of all threads, sampling without decoding, computed as sample_row says."""
    told = ("whole prompt", "95 % interval", "colour", "shape", "motion", "background", "of base")
    paired = ("points to base", "p") if any("true" in row for row in report) else ()
    lines = [("", *told, *paired, "dB", "CPU s/clip", "MB")]
    scores, bases = {row["name"]: row for row in report}, {row.name: row.base for row in ROWS}
    for row in report:
        base = scores.get(bases.get(row["name"]))
        share = _percent(row["all"] / base["all"]) if base and base["all"] else "-"
        parts = [_percent(row[name]) for name in world.ATTRIBUTES]
        apart = _points(row, base) if paired else ()
        likeness = next((f"{row[name]:.1f}" for name in ("psnr", "first_frame") if name in row), "-")
        seconds = f"{row['cpu_seconds']:.2f}" if "cpu_seconds" in row else "-"
        between = f"{_percent(row['low'])[:-1]} to {_percent(row['high'])}"
        size = f"{row['bytes'] / 1e6:.1f}"
        lines.append((row["name"], _percent(row["all"], 1), between, *parts, share, *apart, likeness, seconds, size))
    return lines


def _points(row: dict, base: dict | None) -> tuple[str, str]:
    """(difference of two rows in points with its 95 % interval, McNemar's p)."""
    if base is None or "true" not in row or "true" not in base:
        return "-", "-"
    found = compare(*([mark == "1" for mark in marks["true"]] for marks in (row, base)))
    apart, low, high = (f"{100 * share:+.1f}" for share in found[:3])
    return f"{apart} ({low} to {high})", f"{found.p:.2f}" if found.p >= 0.005 else f"{found.p:.0e}"


def _percent(share: float, digits: int = 0) -> str:
    halves_up = math.floor(100 * share * 10**digits + 0.5 + 1e-6) / 10**digits  # a format takes some down
    return f"{halves_up:.{digits}f}%"


def markdown(report: list[dict]) -> str:
    """The table for a model card."""
    heading, *rows = table(report)
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, ("---",) * len(heading), *rows)) + "\n"


def picture(report: list[dict], folder, path, count: int = 6, seed: int = 1000) -> None:
    """Write the report as PNG: bars, then the first `count` prompts as some of the rows render them."""
    bars = [
        charts.Bar(row["name"], row["all"], _percent(row["all"]), charts.PALE, (row["low"], row["high"]))
        for row in report
    ]
    named = {row["name"] for row in report}
    shown = [row for row in ROWS if row.name in _SHOWN and row.name in named]
    clips, captions = _clips(Path(folder), shown, count, seed)
    parts = [charts.bars("Whole prompt true, share of prompts, with 95 % interval", bars)]
    parts += [charts.strips([row.name for row in shown], captions, clips, _TILE)] if shown else []
    prompts_of = f"{max(row['count'] for row in report)} prompts" if report else ""
    charts.save(charts.sheet("TinyWan: what comes true of a prompt", [prompts_of], parts), path)


def _clips(folder: Path, rows, count: int, seed: int):
    """(for each row, film strips [H, W, 3] of its clips of the report's first prompts; the captions of those)."""
    scenes, captions, context, empty = prompts(folder, BATCH, seed)  # whose clips share a noise
    codec = load_vae(folder / FILES["vae"], dtype=precision.dtype("cpu"))  # as the report has it
    strips = []
    for row in rows:
        y = pictures(codec, scenes, seed)[1] if row.file == "pair" else None
        latents = sample_row(load_row(folder, row)[0], row, context, empty, seed, y)
        strips.append([_strip(video) for video in decode_video(codec, latents[:count])])
    return strips, captions[:count]


def _strip(video):
    picks = torch.linspace(0, video.shape[1] - 1, _FRAMES).round().long()
    return torch.cat(list(to_frames(video[:, picks])), 1).numpy()
