"""What is prepared for a borrowed card runs through, as far as the interpreter goes; its times mean nothing."""

import json
import sys
from types import SimpleNamespace

import torch

from tests.tools import borrowed_card
from turbo_core.bench import check, clip, run
from turbo_core.cli import main

CPU = torch.device("cpu")


def test_stages_change_no_bits(tmp_path):
    assert borrowed_card.stages(CPU, tmp_path / "cpu", quick=True) == 0
    found = json.loads((tmp_path / "cpu" / "stages.json").read_text("utf-8"))
    assert found["same_bits"] and set(found["milliseconds"]) == {"3", "5"}


def test_rows_are_written_beside_the_results(tmp_path):
    assert borrowed_card.rows(CPU, tmp_path / "cpu", quick=True) == 0
    launches = json.loads((tmp_path / "cpu" / "launches.json").read_text("utf-8"))["launches"]
    assert (
        list(launches) == ["block plain short"] == list(json.loads((tmp_path / "cpu" / "rows.json").read_text("utf-8")))
    )


def test_check_and_clip_are_commands_that_there_are(tmp_path, monkeypatch):
    """As far as parsing and the call of what they measure, which takes minutes and has tests of its own."""
    made = []

    def note(name, result):
        return lambda *given, **named: made.append((name, given, named)) or result

    def here(command):
        assert command[:3] == [sys.executable, "-m", "turbo_core"]
        return SimpleNamespace(returncode=main(command[3:]))

    monkeypatch.setattr(borrowed_card.subprocess, "run", here)
    monkeypatch.setattr(check, "check", note("check", [{"ok": False}]))
    monkeypatch.setattr(run, "run", note("run", {}))
    monkeypatch.setattr(clip, "run", note("clip", {"rows": []}))
    assert borrowed_card.check(CPU, tmp_path / "cpu", quick=True) == 1, "a kernel that is wrong is told"
    assert borrowed_card.clip(CPU, tmp_path / "cpu", quick=True) == 0
    names = [name for name, *_ in made]
    assert names == ["check", "run", "clip"] and made[1][1][:3] == (("streaming",), CPU, tmp_path)
    assert made[2][1][1:] == (CPU, tmp_path, True) and (tmp_path / "cpu" / "check.json").exists()


def test_a_step_that_hangs_is_ended_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(borrowed_card, "OUT", tmp_path)
    monkeypatch.setattr(borrowed_card, "STEPS", {"stages": 0.1, "rows": 0.1})
    monkeypatch.setattr(sys, "argv", ["borrowed_card", "--quick", "--device", "cpu"])
    assert borrowed_card.main() == 1
    said = json.loads((tmp_path / "cpu" / "borrowed_card.json").read_text("utf-8"))
    assert [one["exit"] for one in said.values()] == ["not done after 0.1 s"] * 2
