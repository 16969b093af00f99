"""The quick form of the hostile suite: some inputs of every class, and some rounds of races, kills and full disks."""

import sys

import pytest

if sys.platform != "linux":
    pytest.skip("limits of memory, clear_refs and RLIMIT_FSIZE are Linux's", allow_module_level=True)

from tests.helpers.process import run_python
from tests.hostile import honest, races, suite
from tests.hostile.cases import Case
from tests.hostile.classes import KINDS, made, planned
from turbo_core.errors import TurboError


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
    # a change to a header of safetensors is hardly ever without consequence
    assert always_refused <= {"pickle programs", "pickle payloads", "safetensors header"}, always_refused


def test_a_seed_makes_the_same_input_again():
    for kind in KINDS:
        first, again = made(kind, 7), made(kind, 7)
        assert (first.files, first.door, first.arguments) == (again.files, again.door, again.arguments), kind
        assert isinstance(first, Case)


@pytest.mark.parametrize("script", [races.race, races.kills, races.full])
def test_rough_handling_leaves_whole_files(script):
    row = script(4)
    assert row["tried"] == 4 and row["bad"] == 0, row


HARM = """
import os, pickle, subprocess, sys
from pathlib import Path
from tests.hostile.child import Watch
watch = Watch(Path(sys.argv[1]) / "work")
watch.on = watch.strict = True
(Path(sys.argv[1]) / "work" / "inside").write_text("")
assert not watch.seen, watch.seen
(Path(sys.argv[1]) / "outside").write_text("")
(Path(sys.argv[1]) / "work-2").write_text("")
os.replace(Path(sys.argv[1]) / "work" / "inside", Path(sys.argv[1]) / "moved")
os.symlink("outside", Path(sys.argv[1]) / "link")
os.system("true")
subprocess.run(["true"])
pickle.loads(b"cos\\nsystem\\n.")
import wave
try:
    __import__("socket").create_connection(("127.0.0.1", 9), 0.1)
except OSError:
    pass
watch.on = False
print(*watch.seen, sep="\\n")
"""


def test_the_watch_sees_what_it_is_there_for(tmp_path):
    (tmp_path / "work").mkdir()
    seen = run_python("-c", HARM, tmp_path, interpret=False)
    for words in (
        "outside' to write",
        "work-2' to write",
        "moved",
        "os.symlink",
        "os.system",
        "subprocess.Popen",
        "pickle.find_class",
        "imported wave",
        "socket.",
    ):
        assert words in seen, seen


def test_outcomes_are_told_apart(tmp_path):
    from tests.hostile import doors

    def outcome(error, name="x.pth"):
        found = doors.Found()
        with found.door(tmp_path / name):
            raise error
        return list(found.outcomes)

    assert outcome(TurboError(f"{tmp_path / 'x.pth'} is damaged.")) == ["clear"]
    assert outcome(TurboError("It is damaged.")) == ["unclear"]
    assert outcome(TurboError(f"{tmp_path / 'x.pth'} {'y' * 400}")) == ["unclear"]
    assert outcome(KeyError("x")) == ["traceback"] and outcome(MemoryError()) == ["over 1 GB"]
    base = honest.zips()[0]
    other = {name: tensor * 2 for name, tensor in base.state.items()}
    for same, right in (base.state, "fine"), (other, "wrong"):
        (tmp_path / base.name).write_bytes(base.data)
        assert right in doors.opened(Case("checkpoint", {base.name: base.data}, same), tmp_path)
    assert "wrong" in doors.opened(Case("checkpoint", {base.name: base.data}, refuse="a test"), tmp_path)
