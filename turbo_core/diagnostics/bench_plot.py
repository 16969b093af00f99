"""The bars of a benchmark as a PNG, drawn with Pillow: one group of bars for each case, its baseline at 1."""

import io

from ..bench.report import describe, rate

_INK, _FAINT, _PAPER, _GRID = (28, 28, 36), (110, 110, 122), (255, 255, 255), (225, 225, 228)
_OURS, _OTHERS, _BASE = (205, 64, 113), (140, 150, 170), (70, 80, 100)
_MARGIN, _LABELS, _BARS, _FIGURES, _ROW = 24, 300, 520, 200, 21


def draw(report: dict) -> bytes | None:
    """The PNG of a report, or None without Pillow or without a time.

    Bars tell how many times as fast as the case's baseline. Parts of a contender are left to the table.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        return None
    cases = [(case, [row for row in case["rows"] if _is_bar(row)]) for case in report["cases"][1:]]
    cases = [(case, rows) for case, rows in cases if rows]
    if not cases:
        return None
    font, small, large = (ImageFont.load_default(size) for size in (14, 12, 20))
    height = 2 * _MARGIN + 82 + sum(40 + _ROW * len(rows) for _, rows in cases)
    image = Image.new("RGB", (2 * _MARGIN + _LABELS + _BARS + _FIGURES, height), _PAPER)
    canvas = ImageDraw.Draw(image)
    canvas.text((_MARGIN, _MARGIN), f"turbo-core bench {report['group']}", fill=_INK, font=large, anchor="la")
    canvas.text((_MARGIN, _MARGIN + 30), _plain(describe(report["machine"])), fill=_FAINT, font=small, anchor="la")
    limits = report["limits"]
    rates = [
        f"{name} {rate(limits, unit)}" for name, unit in (("copy", "gb_s"), ("product", "tflops")) if unit in limits
    ]
    below = "; ".join([*rates, *report["notes"]])
    canvas.text((_MARGIN, _MARGIN + 48), _plain(below), fill=_FAINT, font=small, anchor="la")
    y = _MARGIN + 82
    for case, rows in cases:
        y = _draw_case(canvas, font, small, case, rows, y)
    buffer = io.BytesIO()
    image.quantize(64).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _is_bar(row):
    return "speedup" in row and not (row["alone"] and row["error"] is None)


def _plain(text):
    return text.encode("latin-1", "replace").decode("latin-1")  # what Pillow's own font has


def _draw_case(canvas, font, small, case, rows, y):
    """Draw one case at y; returns the y below it."""
    canvas.text((_MARGIN, y + 8), _plain(case["name"]), fill=_INK, font=font, anchor="lm")
    y += 22
    left, longest = _MARGIN + _LABELS, max(row["speedup"] for row in rows)
    one = left + _BARS / longest
    bottom = y + _ROW * len(rows)
    for row in rows:
        middle = y + _ROW / 2
        colour = _BASE if row["name"] == case["baseline"] else _OURS if "turbo-core" in row["name"] else _OTHERS
        canvas.text((left - 8, middle), _plain(row["name"]), fill=_INK, font=small, anchor="rm")
        canvas.rectangle([left, y + 3, left + _BARS * row["speedup"] / longest, y + _ROW - 4], fill=colour)
        figures = f"{row['speedup']:.2f}x   {row['ms']:.4g} ms"
        figures += f"   error {row['error']:.0e}" if row.get("error") else ""
        canvas.text((left + _BARS + 10, middle), figures, fill=_INK, font=small, anchor="lm")
        y += _ROW
    canvas.line([(one, bottom - _ROW * len(rows)), (one, bottom)], fill=_GRID)
    return bottom + 18
