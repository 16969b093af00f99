"""Pictures show all of what they are given, in their own colours, and open as PNG."""

import math
import sys

import numpy as np
import pytest

pytest.importorskip("PIL")

from PIL import Image

from turbo_core.diagnostics import charts
from turbo_core.diagnostics.charts import Bar, Panel, badness, percent
from turbo_core.errors import TurboError


def pixels(image):
    return np.asarray(image).astype(int)


def has(image, colour):
    return (pixels(image) == colour).all(2).any()


def is_framed(image):
    """Nothing is cut off at the sides: the margin of a sheet is white."""
    picture = pixels(image)
    sides = picture[:, :20], picture[:, -20:], picture[:20], picture[-20:]
    return all((side == 255).all() for side in sides) and (picture != 255).any(2).mean() > 0.01


def panel(blocks=3, kind="error"):
    values = [[0.001 * 10 ** min(b, 3) for b in range(blocks)] + [math.nan] for _ in range(2)]
    return Panel("title", kind, ["1", "2"], "step", [str(b) for b in range(blocks)], "block", "x0", values)


# 99.6 % kept must not read 100, an error that exists must not read 0
@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [(0, "error", "0"), (1e-9, "error", "<.01"), (0.0005, "error", "0.05"), (0.0249, "error", "2.5"),
     (0.375, "error", "38"), (math.nan, "error", "-"), (math.inf, "error", "inf"), (0.996, "recall", "99"),
     (1.0, "recall", "100"), (1.0000001, "recall", "100"), (0.004, "recall", "0")],
)  # fmt: skip
def test_numbers_in_cells(value, kind, text):
    assert percent(value, kind) == text


def test_worse_is_darker():
    worse = [badness(v, "error") for v in (0.0, 0.001, 0.01, 0.1, 1.0, math.inf)]
    assert worse == sorted(worse) and worse[0] == 0 and worse[-1] == 1
    picture = pixels(charts.heat_map(panel()))
    # the cells of one row, left to right ten times the error each, and one without a number
    middle = [picture[52, 96 + 72 * b + 4].sum() for b in range(3)]
    assert middle[0] > middle[1] > middle[2] > 0
    assert tuple(picture[52, 96 + 72 * 3 + 14]) == charts.GRID


@pytest.mark.parametrize("blocks", [1, 40])
def test_a_sheet_holds_all_of_it(blocks):
    maps = [charts.heat_map(panel(blocks, kind)) for kind in ("error", "recall")]
    assert is_framed(charts.sheet("title", ["模型 " + "long " * 30, "gjpq"], maps))  # no letters for the first word
    assert is_framed(
        charts.sheet("a title that is longer than everything below it, which has no width of its own", [], maps[:1])
    )


def test_bars_are_as_long_as_they_say():
    rows = [
        Bar("base", 0.5, "1.00x"),
        Bar("ours", 1.0, "2.00x", charts.OURS),
        Bar("none", 0.0, "0%", charts.PALE, (0, 0.2)),
    ]
    picture = charts.bars("case", rows, line=0.5)
    length = {colour: (pixels(picture) == colour).all(2).any(0).sum() for colour in (charts.BASE, charts.OURS)}
    assert abs(length[charts.OURS] - 2 * length[charts.BASE]) <= 2
    assert has(picture, charts.GRID) and has(picture, charts.LINE)
    assert is_framed(charts.sheet("bars", [], [picture]))


def test_a_curve_stays_within_its_axes():
    points = [(0, 5), (10, 1), (20, 1000)]  # beyond the axis at both ends
    plain = charts.curve("flat", [([(0, 2), (20, 2)], charts.LINE, 2)], ("x", [0, 20]), [1, 10])
    picture = charts.curve("name", [(points, charts.LINE, 2)], ("x", [0, 10]), [2, 10], True, (0, 5), [(10, 5)], "note")
    rows, columns = np.nonzero((pixels(picture) == charts.LINE).all(2))
    assert picture.size == plain.size
    assert 28 <= rows.min() < 32 and 244 <= rows.max() <= 250 and columns.max() <= 70 + 860 + 1
    assert has(picture, charts.MARK) and has(picture, charts.BAND) and not has(plain, charts.MARK)


def test_a_history_of_numbers_that_come_late_are_flat_or_not_finite(tmp_path):
    history = [{"loss": 10 ** (-i / 20)} | ({"late": 1.0} if i > 50 else {}) for i in range(100)]
    history[3]["loss"] = math.inf
    one, two = charts.history("loss", [{"loss": 1.0}] * 9), charts.history("distill", history)
    assert is_framed(two) and has(two, charts.LINE) and two.height > one.height + 200
    for name, values in (("curves", history), ("one", [{"one": 0.0}]), ("none", [])):
        charts.save(charts.history(name, values), tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.format == "PNG" and picture.width > 60


def test_strips_stand_in_their_column_and_row():
    colours = [[(200, 0, 0), (0, 200, 0)], [(0, 0, 200), (90, 90, 0)]]
    pictures = [[np.full((8, 40, 3), colour, np.uint8) for colour in column] for column in colours]
    image = charts.strips(["one", "two"], ["a caption", "another, longer than both strips together " * 3], pictures, 16)
    for c, column in enumerate(colours):
        for r, colour in enumerate(column):
            y, x = np.nonzero((pixels(image) == colour).all(2))
            assert (len(x), x.min(), y.min()) == (80 * 16, c * 92, 24 + 40 * r + 18)
    assert is_framed(charts.sheet("", [], [image]))


def test_a_picture_that_cannot_be_written_is_a_person_s_error(tmp_path):
    with pytest.raises(TurboError, match="rights"):
        charts.save(charts.history("none", []), tmp_path / "none" / "curves.png")


def test_without_pillow_the_cure_is_named(monkeypatch):
    assert charts.available()
    for name in [name for name in sys.modules if name.partition(".")[0] == "PIL"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert not charts.available()
    with pytest.raises(TurboError, match="pip install"):
        charts.heat_map(panel())


def test_a_heading_is_broken_and_a_heat_map_holds_its_title():
    """A long line of head made the sheet three times as wide as its maps; the title of a narrow map was cut."""
    narrow = charts.heat_map(panel()._replace(title="Share that other top-k would keep, %, mean of all steps"))
    assert is_framed(charts.sheet("title", ["word " * 100], [narrow]))
    assert charts.sheet("title", ["word " * 100], [narrow]).width <= narrow.width + 2 * 24
