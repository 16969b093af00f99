"""Each finding of the first hostile run, made again: the right error, or the right result."""

import re
import sys

import pytest

if sys.platform != "linux":
    pytest.skip("limits of memory and clear_refs are Linux's", allow_module_level=True)

from tests.hostile import suite
from tests.hostile.findings import FINDINGS


@pytest.fixture(scope="module")
def outcomes():
    """{finding: (outcome, its first detail)}, all from one child."""
    return {name: found[0][1:] for name, found in suite.tried([(name, 0) for name in FINDINGS]).items()}


@pytest.mark.parametrize("name", FINDINGS)
def test_what_was_found_once(outcomes, name):
    outcome, detail = outcomes[name]
    words = FINDINGS[name][1]
    assert outcome == ("clear" if words else "fine"), detail
    assert re.search(words, detail), detail
