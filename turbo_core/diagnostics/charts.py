"""Tables of shares as heat maps with their numbers in the cells, drawn with Pillow."""

import math
from dataclasses import dataclass

import numpy as np

from ..errors import missing_library

# light is good, dark is bad; even steps of lightness, readable with any kind of colour vision
_COLOURS = np.array([(252, 253, 219), (254, 196, 131), (248, 118, 92), (205, 64, 113), (129, 37, 129), (59, 15, 112)])
_INK, _FAINT, _PAPER, _NONE = (28, 28, 36), (110, 110, 122), (255, 255, 255), (225, 225, 228)
_LEFT, _RIGHT, _MARGIN, _CELL_HEIGHT, _GAP = 96, 92, 24, 28, 10
_WIDTH = 1240  # aim of all cells of a row together
_DECADES = (0.001, 0.01, 0.1, 1.0)  # ticks of the colours of errors


@dataclass(frozen=True)
class Panel:
    """One heat map. values: [rows][columns], shares (1 = 100 %), nan where there is none; the last column stands
    apart under the label `summary`. kind "error": colours from 0.1 % to 100 %, logarithmic; "recall": 100 % to 0 %.
    """

    title: str
    kind: str
    rows: list[str]
    row_name: str
    columns: list[str]
    column_name: str
    summary: str
    values: list[list[float]]


def badness(value: float, kind: str) -> float:
    """0 (light) to 1 (dark)."""
    if kind == "recall":
        return min(1.0, max(0.0, 1 - value))
    return min(1.0, max(0.0, math.log10(max(value, 1e-9) / _DECADES[0]) / 3))


def percent(value: float, kind: str) -> str:
    """At most four characters: 0, <.01, 0.05, 0.4, 2.5, 37, 100."""
    value *= 100
    if not math.isfinite(value):
        return "-" if math.isnan(value) else "inf"
    if kind == "recall":
        # 99.6 is not everything
        return f"{min(value, 99.0) if value < 99.995 else value:.0f}"
    if value == 0:
        return "0"
    if value < 0.005:
        return "<.01"
    return f"{value:.2f}" if value < 0.095 else f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _colour(level):
    position = level * (len(_COLOURS) - 1)
    low = min(int(position), len(_COLOURS) - 2)
    return tuple(int(c) for c in np.round(_COLOURS[low] + (position - low) * (_COLOURS[low + 1] - _COLOURS[low])))


def _legend(draw, font, x, top, height, kind):
    for y in range(height):
        draw.line([(x, top + y), (x + 13, top + y)], fill=_colour(1 - y / max(1, height - 1)))
    ticks = _DECADES if kind == "error" else (0.0, 0.5, 1.0)
    for tick in ticks:
        y = top + (1 - badness(tick, kind)) * (height - 1)
        label = f"{tick * 100:g} %"
        draw.line([(x + 14, y), (x + 17, y)], fill=_FAINT)
        draw.text((x + 21, y), label, fill=_FAINT, font=font, anchor="lm")


def _draw_panel(draw, fonts, panel, top, cell):
    """Draw one panel with its title at y = top; returns the y below it."""
    heading, body, small = fonts
    draw.text((_MARGIN, top), panel.title, fill=_INK, font=heading, anchor="la")
    top += 30
    draw.text((_MARGIN + _LEFT - 8, top + 8), panel.row_name, fill=_FAINT, font=small, anchor="rm")
    names = [*panel.columns, panel.summary]
    left = [_MARGIN + _LEFT + i * cell + (_GAP if i == len(panel.columns) else 0) for i in range(len(names))]
    for x, name in zip(left, names):
        draw.text((x + cell / 2, top + 8), name, fill=_FAINT, font=small, anchor="mm")
    top += 18
    for row, (name, values) in enumerate(zip(panel.rows, panel.values)):
        y = top + row * _CELL_HEIGHT
        draw.text((_MARGIN + _LEFT - 8, y + _CELL_HEIGHT / 2), name, fill=_INK, font=body, anchor="rm")
        for x, value in zip(left, values):
            level = None if math.isnan(value) else badness(value, panel.kind)
            fill = _NONE if level is None else _colour(level)
            draw.rectangle([x, y, x + cell - 2, y + _CELL_HEIGHT - 2], fill=fill)
            ink = _PAPER if level is not None and level > 0.5 else _INK
            place = (x + (cell - 2) / 2, y + (_CELL_HEIGHT - 2) / 2)
            draw.text(place, percent(value, panel.kind), fill=ink, font=small, anchor="mm")
    bottom = top + len(panel.rows) * _CELL_HEIGHT
    _legend(draw, small, left[-1] + cell + 14, top, max(bottom - top - 2, 3 * _CELL_HEIGHT), panel.kind)
    draw.text((_MARGIN + _LEFT, bottom + 11), panel.column_name, fill=_FAINT, font=small, anchor="lm")
    return max(bottom, top + 3 * _CELL_HEIGHT) + 42


def draw(title: str, lines: list[str], panels: list[Panel]) -> np.ndarray:
    """A picture of panels under each other, below a title and lines of text.

    All panels have the same number of columns. Returns uint8 [height, width, 3]. Raises TurboError without Pillow.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise missing_library("pillow", "Drawing a heat map") from None
    fonts = [ImageFont.load_default(size) for size in (17, 14, 12)]
    lines = [line.encode("latin-1", "replace").decode("latin-1") for line in lines]  # what Pillow's own font has
    columns = max(len(panel.columns) for panel in panels) + 1
    cell = max(30, min(72, _WIDTH // columns))
    text_width = max(map(fonts[1].getlength, lines), default=0)
    width = max(_LEFT + columns * cell + _GAP + _RIGHT, int(text_width), 520) + 2 * _MARGIN
    height = _MARGIN + 38 + 20 * len(lines) + 14
    height += sum(30 + 18 + max(3, len(panel.rows)) * _CELL_HEIGHT + 42 for panel in panels)
    image = Image.new("RGB", (width, height), _PAPER)
    canvas = ImageDraw.Draw(image)
    canvas.text((_MARGIN, _MARGIN), title, fill=_INK, font=ImageFont.load_default(22), anchor="la")
    y = _MARGIN + 38
    for line in lines:
        canvas.text((_MARGIN, y), line, fill=_FAINT, font=fonts[1], anchor="la")
        y += 20
    y += 14
    for panel in panels:
        y = _draw_panel(canvas, fonts, panel, y, cell)
    return np.asarray(image).copy()
