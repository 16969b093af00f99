"""What errors say: one line, short, without what a terminal obeys, whatever a file or a person gave."""

import ast
from pathlib import Path

import pytest

from turbo_core.errors import TurboError, quoted, shown

ROOT = Path(__file__).resolve().parents[1]


def test_an_error_is_one_line_that_no_terminal_obeys():
    text = str(TurboError("a\nb\x1b[2J\u202ec\ud800"))
    assert text.isprintable() and text == r"a\nb\x1b[2J\u202ec\ud800"


@pytest.mark.parametrize("give", [shown, quoted])
def test_what_came_is_no_longer_than_a_line(give):
    for value in ("x" * 10_000, "\x1b" * 100, "\ud800" * 100):
        text = give(value)
        assert len(text) <= 80 and text.isprintable()
    assert quoted("x") == "'x'" and quoted(7) == "7" and shown("x") == "x"


def messages():
    """(place, the words that stand in the code) of each TurboError that is made of one text."""
    for room in ("turbo_core", "nodes"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "TurboError" and node.args:
                    parts = [part for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
                    words = "".join(part.value for part in parts if isinstance(part.value, str))
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", words


def test_errors_leave_room_for_what_they_name():
    """At most 400 characters with a name or two from a file, which are 80 each at most."""
    found = list(messages())
    assert len(found) > 300
    assert not [place for place, words in found if len(words) > 300 or not words.isprintable()]
