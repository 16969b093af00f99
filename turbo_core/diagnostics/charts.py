"""Pictures of figures, drawn with Pillow: bars, curves, heat maps and film strips.

Each kind is a function that returns a Pillow image; sheet puts several under a title, save and png write the sheet.
"""

import functools
import io
import math
from typing import NamedTuple

import numpy as np

from ..errors import TurboError, missing_library
from ..files import written_aside

INK, FAINT, PAPER, GRID, BAND = (28, 28, 36), (110, 110, 122), (255, 255, 255), (225, 225, 228), (244, 245, 248)
OURS, OTHERS, BASE = (205, 64, 113), (140, 150, 170), (70, 80, 100)  # of bars that are compared
LINE, PALE, MARK = (37, 87, 167), (190, 208, 235), (208, 68, 43)
# of heat maps: light is good, dark is bad; even steps of lightness, readable with any kind of colour vision
_HEAT = np.array([(252, 253, 219), (254, 196, 131), (248, 118, 92), (205, 64, 113), (129, 37, 129), (59, 15, 112)])
_DECADES = (0.001, 0.01, 0.1, 1.0)  # ticks of the colours of errors
_SMALL, _BODY, _HEADING, _TITLE = 12, 14, 17, 22  # sizes of letters
_MARGIN, _GAP = 24, 18  # around a sheet and between its parts


class Bar(NamedTuple):
    """One bar: its name, its length as a share of the longest that fits, the text behind it; interval: two shares."""

    name: str
    share: float
    text: str
    colour: tuple = BASE
    interval: tuple[float, float] | None = None


class Panel(NamedTuple):
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


def available() -> bool:
    """True where Pillow is installed."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        return False
    return True


def sheet(title: str, lines: list[str], parts: list):
    """A picture of a title, lines of text and parts below each other. Raises TurboError without Pillow."""
    parts = [_heading(title, lines, max((part.width for part in parts), default=0)), *parts]
    width, height = max(part.width for part in parts), sum(part.height + _GAP for part in parts) - _GAP
    image, _ = _canvas(width + 2 * _MARGIN, height + 2 * _MARGIN)
    y = _MARGIN
    for part in parts:
        image.paste(part, (_MARGIN, y))
        y += part.height + _GAP
    return image


def _heading(title: str, lines: list[str], wide: int):
    """The title and the lines, broken where they would be wider than the title and what stands below them."""
    wide = max(wide, _width(title, _TITLE))
    lines = [piece for line in lines for piece in _broken(line, wide, _BODY)]
    width = max([_width(title, _TITLE), *(_width(line, _BODY) for line in lines)])
    image, pen = _canvas(math.ceil(width), 38 + 20 * len(lines))
    _write(pen, (0, 0), title, INK, _TITLE, "la")
    for i, line in enumerate(lines):
        _write(pen, (0, 38 + 20 * i), line, FAINT, _BODY, "la")
    return image


def png(image, colours: int | None = None) -> bytes:
    """A picture as PNG, of so many colours where a number is given, which makes a drawing without photographs small."""
    buffer = io.BytesIO()
    (image.quantize(colours) if colours else image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def save(image, path) -> None:
    """Write a picture as PNG. Raises TurboError where the file cannot be written."""
    try:
        with written_aside(path) as aside:
            aside.write_bytes(png(image))
    except OSError as error:
        raise TurboError(f"Could not write {path} ({error}). Check the folder's rights and the free space.") from error


def bars(heading: str, rows: list[Bar], line: float | None = None):
    """Bars from the left with their names before and their texts behind them; line: a share at which a line stands."""
    left, longest, step, top = 300, 520, 22, 26
    texts = max(_width(row.text, _SMALL) for row in rows)
    image, pen = _canvas(int(left + longest + 10 + texts), top + step * len(rows))
    _write(pen, (0, 8), heading, INK, _BODY)
    for i, row in enumerate(rows):
        y = top + step * i
        middle = y + step / 2
        _write(pen, (left - 8, middle), row.name, anchor="rm")
        pen.rectangle([left, y + 3, left + longest, y + step - 4], fill=BAND)
        pen.rectangle([left, y + 3, left + longest * row.share, y + step - 4], fill=row.colour)
        if row.interval is not None:
            pen.line([(left + longest * end, middle) for end in row.interval], fill=LINE, width=3)
        _write(pen, (left + longest + 10, middle), row.text)
    if line is not None:
        pen.line([(left + longest * line, top), (left + longest * line, image.height)], fill=GRID)
    return image


def curve(heading: str, lines, x_axis, y_axis, logarithmic=False, shaded=None, marked=(), note=""):
    """Lines over an axis. lines: [(points [(x, y)], colour, width)].

    x_axis: (name, its ticks), as long as ticks and points are; y_axis: its ticks, from the least to the largest of
    which it goes: points beyond are drawn at its end. shaded: (x, x), a part of the x axis with a ground of its own.
    marked: points with a dot. note: stands above at the right.
    """
    width, height, left, top = 860, 220, 70, 28
    image, pen = _canvas(left + width + 24, top + height + 38)
    x_name, x_ticks = x_axis
    scale = math.log if logarithmic else float
    places = [*x_ticks, *(x for points, _, _ in lines for x, _ in points)]
    across, (low, high) = (min(places), max(places)), (min(y_axis), max(y_axis))

    def place(x, y):
        up = _share(scale(min(max(y, low), high)), scale(low), scale(high))
        return left + width * _share(x, *across), top + height * (1 - up)

    if shaded is not None:
        pen.rectangle([*place(shaded[0], high), *place(shaded[1], low)], fill=BAND)
    for tick in y_axis:
        (x, y), (end, _) = place(across[0], tick), place(across[1], tick)
        pen.line([x, y, end, y], fill=GRID)
        _write(pen, (x - 8, y), f"{tick:.3g}" if isinstance(tick, float) else f"{tick}", FAINT, anchor="rm")
    for tick in x_ticks:
        _write(pen, (place(tick, low)[0], top + height + 8), f"{tick}", FAINT, anchor="mt")
    for points, colour, thick in lines:
        if len(points) > 1:
            pen.line([place(*point) for point in points], fill=colour, width=thick, joint="curve")
    for x, y in (place(*point) for point in marked):
        pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=MARK)
    _write(pen, (left, 8), heading, INK, _BODY)
    _write(pen, (left + width, 8), note, FAINT, anchor="rm")
    _write(pen, (left + width / 2, image.height - 8), x_name, FAINT, anchor="mm")
    return image


def _share(value, low, high):
    """Where value lies between low and high, 0 to 1; in the middle where they are the same."""
    return (value - low) / (high - low) if high > low else 0.5


def history(title: str, values: list[dict]):
    """The picture of a training: a curve for each name of [{name: number}], each step pale, its moving average dark;
    logarithmic where it spans decades."""
    names = dict.fromkeys(name for step in values for name in step)
    return sheet(title, [f"{len(values)} steps"], [_history(name, values) for name in names])


def _history(name, values):
    points = [(i, step[name]) for i, step in enumerate(values) if name in step and math.isfinite(step[name])]
    ordered = sorted(value for _, value in points) or [0.0]
    low, high = ordered[len(ordered) // 100], ordered[-1 - len(ordered) // 100]  # all but the rare extremes
    logarithmic = low > 0 and high / low > 20
    average, smooth = points[0][1] if points else None, []
    for step, value in points:
        average = 0.95 * average + 0.05 * value
        smooth.append((step, average))
    lines = [(points, PALE, 1), (smooth, LINE, 2)]
    steps = ("step", sorted({0, (len(values) - 1) // 2, len(values) - 1}))
    note = f"last {points[-1][1]:.4g}" if points else ""
    heading = f"{name} (logarithmic)" if logarithmic else name
    return curve(heading, lines, steps, [float(low), float(high)], logarithmic, note=note)


def strips(columns: list[str], captions: list[str], pictures, height: int):
    """Film strips side by side: pictures[column][row], uint8 [H, W, 3], drawn so high; a caption above each row."""
    scaled = [[_pillow()[0].fromarray(picture) for picture in column] for column in pictures]
    wide = max(round(picture.width * height / picture.height) for column in scaled for picture in column)
    step, gap, top = height + 24, 12, 24
    captioned = max(_width(caption, _SMALL) for caption in captions)
    width = max((wide + gap) * len(columns) - gap, int(captioned))
    image, pen = _canvas(width, top + step * len(captions))
    for r, caption in enumerate(captions):
        _write(pen, (0, top + step * r + 8), caption, FAINT)
    for c, (name, column) in enumerate(zip(columns, scaled)):
        _write(pen, (c * (wide + gap), 8), name, INK, _BODY)
        for r, picture in enumerate(column):
            size = round(picture.width * height / picture.height), height
            image.paste(picture.resize(size), (c * (wide + gap), top + step * r + 18))
    return image


def _broken(line: str, wide: float, size: int) -> list[str]:
    """The line in pieces that are at most so wide, broken at spaces; a word that is wider stays whole."""
    pieces, piece = [], ""
    for word in line.split(" "):
        longer = f"{piece} {word}" if piece else word
        if piece and _width(longer, size) > wide:
            pieces, piece = [*pieces, piece], f"    {word}"
        else:
            piece = longer
    return [*pieces, piece]


def heat_map(panel: Panel):
    """A table of shares with colours behind its numbers, and what the colours mean at its side."""
    left, cell_height, gap = 96, 28, 10
    names = [*panel.columns, panel.summary]
    cell = max(26, min(72, 900 // len(names)))  # 40 blocks fit the width of a node and stay legible
    top, body = 48, cell_height * len(panel.rows)
    tall = max(3 * cell_height, body)  # the colours need some room
    width = max(left + len(names) * cell + gap + 92, math.ceil(_width(panel.title, _HEADING)))
    image, pen = _canvas(width, top + tall + 22)
    _write(pen, (0, 0), panel.title, INK, _HEADING, "la")
    _write(pen, (left - 8, 38), panel.row_name, FAINT, anchor="rm")
    places = [left + i * cell + (gap if i == len(panel.columns) else 0) for i in range(len(names))]
    for x, name in zip(places, names):
        _write(pen, (x + cell / 2, 38), name, FAINT, anchor="mm")
    for row, (name, values) in enumerate(zip(panel.rows, panel.values)):
        y = top + row * cell_height
        _write(pen, (left - 8, y + cell_height / 2), name, INK, _BODY, "rm")
        for x, value in zip(places, values):
            level = None if math.isnan(value) else badness(value, panel.kind)
            pen.rectangle([x, y, x + cell - 2, y + cell_height - 2], fill=GRID if level is None else _heat(level))
            ink = PAPER if level is not None and level > 0.5 else INK
            middle = (x + (cell - 2) / 2, y + (cell_height - 2) / 2)
            _write(pen, middle, percent(value, panel.kind), ink, anchor="mm")
    _legend(pen, places[-1] + cell + 14, top, tall - 2, panel.kind)
    _write(pen, (left, top + body + 11), panel.column_name, FAINT)
    return image


def _legend(pen, x, top, height, kind):
    for y in range(height):
        pen.line([(x, top + y), (x + 13, top + y)], fill=_heat(1 - y / max(1, height - 1)))
    for tick in _DECADES if kind == "error" else (0.0, 0.5, 1.0):
        y = top + (1 - badness(tick, kind)) * (height - 1)
        pen.line([(x + 14, y), (x + 17, y)], fill=FAINT)
        _write(pen, (x + 21, y), f"{tick * 100:g} %", FAINT)


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


def _heat(level):
    position = level * (len(_HEAT) - 1)
    low = min(int(position), len(_HEAT) - 2)
    return tuple(int(c) for c in np.round(_HEAT[low] + (position - low) * (_HEAT[low + 1] - _HEAT[low])))


def _pillow():
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise missing_library("pillow", "Drawing a picture") from error
    return Image, ImageDraw, ImageFont


def _canvas(width: int, height: int):
    """(a white picture, the pen that draws on it)."""
    Image, ImageDraw, _ = _pillow()
    image = Image.new("RGB", (width, height), PAPER)
    return image, ImageDraw.Draw(image)


def _write(pen, place, text: str, colour=INK, size: int = _SMALL, anchor: str = "lm") -> None:
    pen.text(place, _plain(text), fill=colour, font=_font(size), anchor=anchor)


def _width(text: str, size: int) -> float:
    return _font(size).getlength(_plain(text))


def _plain(text: str) -> str:
    return text.encode("latin-1", "replace").decode("latin-1")  # what Pillow's own font has


@functools.cache
def _font(size: int):
    return _pillow()[2].load_default(size)
