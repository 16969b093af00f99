"""Loss curves as a picture: one panel for each number of a history, logarithmic where it spans decades."""

import math

from ..errors import TurboError, missing_library
from ..files import complete_or_nothing

_WIDTH, _HEIGHT, _LEFT, _TOP, _GAP = 640, 200, 70, 26, 20
_INK, _FAINT, _LINE, _PALE = (28, 28, 36), (150, 150, 160), (37, 87, 167), (190, 208, 235)


def draw(history: list[dict], path) -> None:
    """Write the curves of a history, [{name: number}], as PNG: each step pale, its moving average dark."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise missing_library("pillow", "Drawing loss curves") from error
    names = list(dict.fromkeys(name for values in history for name in values))
    height = max(1, len(names)) * (_HEIGHT + _TOP + _GAP) + _GAP
    image = Image.new("RGB", (_LEFT + _WIDTH + _GAP, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for row, name in enumerate(names):
        points = [(i, values[name]) for i, values in enumerate(history) if name in values]
        points = [(i, value) for i, value in points if math.isfinite(value)]
        _panel(pen, font, name, points, len(history), _GAP + row * (_HEIGHT + _TOP + _GAP))
    try:
        with complete_or_nothing(path) as part:
            image.save(part)
    except OSError as error:
        raise TurboError(f"Could not write {path} ({error}). Check the folder's rights and the free space.") from error


def _panel(pen, font, name: str, points: list, steps: int, top: int) -> None:
    values = sorted(value for _, value in points) or [0.0]
    low, high = values[len(values) // 100], values[-1 - len(values) // 100]
    logarithmic = low > 0 and high / low > 20
    title = f"{name} (logarithmic)" if logarithmic else name
    pen.text((_LEFT, top), f"{title}   last {points[-1][1]:.4g}" if points else title, fill=_INK, font=font)
    top += _TOP
    pen.rectangle([_LEFT, top, _LEFT + _WIDTH, top + _HEIGHT], outline=_FAINT)
    for value, y in ((high, top), (low, top + _HEIGHT)):
        pen.text((_LEFT - 6, y), f"{value:.3g}", fill=_FAINT, font=font, anchor="rm")

    def place(step, value):
        inside = min(max(value, low), high)
        pair = (math.log(inside / low), math.log(high / low)) if logarithmic else (inside - low, high - low)
        share = pair[0] / pair[1] if pair[1] else 0.5
        return _LEFT + _WIDTH * step / max(1, steps - 1), top + _HEIGHT * (1 - share)

    average, smooth = None, []
    for step, value in points:
        average = value if average is None else 0.95 * average + 0.05 * value
        smooth.append((step, average))
    for line, colour, width in ((points, _PALE, 1), (smooth, _LINE, 2)):
        if len(line) > 1:
            pen.line([place(*point) for point in line], fill=colour, width=width)
