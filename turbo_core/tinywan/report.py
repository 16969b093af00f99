"""The quality report as a table and as one picture: bars with their confidence intervals, and clips side by side."""

import math
from pathlib import Path

import torch

from ..errors import TurboError, missing_library
from ..files import complete_or_nothing
from ..pipeline.video import to_frames
from . import FILES, data, vae, world
from .evaluate import BATCH
from .rows import ROWS, load_row, pictures, prompts, sample_row

_INK, _FAINT, _BAR, _HELD = (28, 28, 36), (140, 140, 150), (37, 87, 167), (190, 208, 235)
_LEFT, _WIDTH, _LINE, _MARGIN = 300, 420, 24, 20
_SHOWN = (
    "teacher, 50 steps, guidance 3",
    "rCM, 4 steps",
    "rCM, 1 step",
    "rCM 4 + SLA top-k 0.15",
    "rCM 4 + W8A8 block",
    "I2V, 4 steps, SLA top-k 0.15",
)
_FRAMES, _TILE = 5, 96


def table(report: list[dict]) -> list[tuple[str, ...]]:
    """The rows of a report as text, a heading first; every acceleration against what it accelerates. dB: of clips that
    went through the VAE, and of the first frame against the picture that was given."""
    told = ("whole prompt", "95 % interval", "colour", "shape", "motion", "background", "of base", "dB", "s/clip", "MB")
    lines = [("", *told)]
    scores, bases = {row["name"]: row for row in report}, {row.name: row.base for row in ROWS}
    for row in report:
        base = scores.get(bases.get(row["name"]))
        share = _percent(row["all"] / base["all"]) if base and base["all"] else "-"
        parts = [_percent(row[name]) for name in world.ATTRIBUTES]
        likeness = next((f"{row[name]:.1f}" for name in ("psnr", "first_frame") if name in row), "-")
        seconds = f"{row['seconds']:.2f}" if "seconds" in row else "-"
        between = f"{_percent(row['low'])[:-1]} to {_percent(row['high'])}"
        size = f"{row['bytes'] / 1e6:.1f}"
        lines.append((row["name"], _percent(row["all"], 1), between, *parts, share, likeness, seconds, size))
    return lines


def _percent(share: float, digits: int = 0) -> str:
    halves_up = math.floor(100 * share * 10**digits + 0.5 + 1e-6) / 10**digits  # a format takes some down
    return f"{halves_up:.{digits}f}%"


def markdown(report: list[dict]) -> str:
    """The table for a model card."""
    heading, *rows = table(report)
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, ("---",) * len(heading), *rows)) + "\n"


def picture(report: list[dict], folder, path, count: int = 6, seed: int = 1000) -> None:
    """Write the report as PNG: bars, then a few prompts as some of the rows render them."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise missing_library("pillow", "Drawing the report") from error
    names = [row["name"] for row in report]
    shown = [row for row in ROWS if row.name in _SHOWN and row.name in names]
    videos, captions = _clips(Path(folder), shown, count, seed)
    bars = _MARGIN * 2 + _LINE * (len(report) + 2)
    column = _FRAMES * _TILE + 12
    width = max(_LEFT + _WIDTH + 90, _MARGIN * 2 + column * len(shown))
    image = Image.new("RGB", (width, bars + 30 + count * (_TILE + 24) + _MARGIN), "white")
    pen, font, small = ImageDraw.Draw(image), ImageFont.load_default(14), ImageFont.load_default(12)
    pen.text((_MARGIN, 8), "Whole prompt true, share of prompts, with 95 % interval", fill=_INK, font=font)
    for i, row in enumerate(report):
        _bar(pen, font, row, _MARGIN + _LINE * (i + 1))
    for c, row in enumerate(shown):
        left = _MARGIN + c * column
        pen.text((left, bars), row.name, fill=_INK, font=font)
        for r, (video, caption) in enumerate(zip(videos[row.name], captions)):
            top = bars + 30 + r * (_TILE + 24)
            if c == 0:
                pen.text((left, top), caption, fill=_FAINT, font=small)
            picks = torch.linspace(0, video.shape[1] - 1, _FRAMES).round().long()
            strip = torch.cat(list(to_frames(video[:, picks])), 1).numpy()
            image.paste(Image.fromarray(strip).resize((_FRAMES * _TILE, _TILE)), (left, top + 16))
    try:
        with complete_or_nothing(path) as part:
            image.save(part)
    except OSError as error:
        raise TurboError(f"Could not write {path} ({error}). Check the folder's rights and the free space.") from error


def _bar(pen, font, row: dict, top: int) -> None:
    middle = top + _LINE // 2
    pen.text((_LEFT - 8, middle), row["name"], fill=_INK, font=font, anchor="rm")
    pen.rectangle([_LEFT, top + 4, _LEFT + _WIDTH, top + _LINE - 4], fill=(244, 245, 248))
    pen.rectangle([_LEFT, top + 4, _LEFT + _WIDTH * row["all"], top + _LINE - 4], fill=_HELD)
    low, high = (_LEFT + _WIDTH * row[end] for end in ("low", "high"))
    pen.line([(low, middle), (high, middle)], fill=_BAR, width=3)
    pen.text((_LEFT + _WIDTH + 8, middle), _percent(row["all"]), fill=_INK, font=font, anchor="lm")


def _clips(folder: Path, rows, count: int, seed: int):
    """({row's name: clips [count, 3, T, H, W]}, captions) of the first prompts of the report."""
    scenes, captions, context, empty = prompts(folder, BATCH, seed)  # whose clips share a noise
    decoder = vae.load(folder / FILES["vae"])
    videos = {}
    for row in rows:
        y = pictures(decoder, scenes, seed)[1] if row.file == "pair" else None
        latents = sample_row(load_row(folder, row)[0], row, context, empty, seed, y)
        videos[row.name] = data.decode_latents(decoder, latents[:count])
    return videos, captions[:count]
