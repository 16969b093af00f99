"""What is prepared for a borrowed card runs through, as far as the interpreter goes; its times mean nothing."""

import json
import sys

import torch

from tests.tools import borrowed_card

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


def test_a_step_that_hangs_is_ended_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(borrowed_card, "OUT", tmp_path)
    monkeypatch.setattr(borrowed_card, "STEPS", {"stages": 0.1, "rows": 0.1})
    monkeypatch.setattr(sys, "argv", ["borrowed_card", "--quick", "--device", "cpu"])
    assert borrowed_card.main() == 1
    said = json.loads((tmp_path / "cpu" / "borrowed_card.json").read_text("utf-8"))
    assert [one["exit"] for one in said.values()] == ["not done after 0.1 s"] * 2
