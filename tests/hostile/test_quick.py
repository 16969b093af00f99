"""The quick form of the hostile suite: some inputs of every class, and some rounds of races, kills and full disks."""

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("limits of memory, clear_refs and RLIMIT_FSIZE are Linux's", allow_module_level=True)

from tests.hostile import races, suite
from tests.hostile.cases import Case
from tests.hostile.classes import KINDS, made, planned


def test_no_input_does_harm():
    results = suite.tried(planned(1500))
    assert results.keys() == KINDS.keys()
    wrong = suite.bad(results)
    assert not wrong, "\n".join(
        f"{one['class']} {one['seed']}: {one['outcome']}: {one['detail']}" for one in wrong[:20]
    )
    outcomes = {kind: {outcome for _, outcome, _ in found} for kind, found in results.items()}
    # a class of which nothing is taken, where something should be, tests one line of the reader
    always_refused = {kind for kind, found in outcomes.items() if found == {"clear"}}
    assert always_refused <= {"pickle programs", "pickle payloads"}, always_refused


def test_a_seed_makes_the_same_input_again():
    for kind in KINDS:
        first, again = made(kind, 7), made(kind, 7)
        assert (first.files, first.door, first.arguments) == (again.files, again.door, again.arguments), kind
        assert isinstance(first, Case)


@pytest.mark.parametrize("script", [races.race, races.kills, races.full])
def test_rough_handling_leaves_whole_files(script):
    row = script(4)
    assert row["tried"] == 4 and row["bad"] == 0, row
