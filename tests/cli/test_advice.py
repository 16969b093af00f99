"""turbo-core plan and doctor."""

import json

import pytest
import torch

from tests.helpers.tiny_dits import TINY, tiny_state_dict
from turbo_core.cli import main
from turbo_core.diagnostics import doctor


def test_plan_of_published_models_and_of_a_file(tmp_path, capsys):
    assert main(["plan", "--model", "t2v-14b", "--size", "720p", "--memory", "16"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "16 GiB: 1280x720" in out and "32 GiB:" not in out and "sampling" in out
    assert "75600 tokens, linear branch" in out and "not a measurement" in out
    torch.save(tiny_state_dict(0, TINY._replace(in_dim=36)), tmp_path / "tiny.pth")
    assert main(["plan", str(tmp_path / "tiny.pth"), "--size", "64x64", "--frames", "5", "--experts", "2"]) == 0
    out = capsys.readouterr().out
    assert "8 GiB: 64x64, 5 frames, bf16" in out and "32 GiB:" in out and "VAE encode" in out
    assert main(["plan", str(tmp_path / "none.pth")]) == 2
    assert "--model" not in capsys.readouterr().err
    assert main(["plan", "14B"]) == 2 and "--model t2v-14b or i2v-a14b." in capsys.readouterr().err
    assert main(["plan", "--size", "33x33"]) == 2
    assert main(["plan", "--memory", "nan"]) == 2
    assert main(["plan", "--memory", "0"]) == 2


def test_doctor_tells_the_path_of_every_part(capsys):
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    paths = dict(findings["paths"])
    assert {"int8 linear", "sparse attention", "text encoder", "VAE", "generate"} <= set(paths)
    assert paths["generate"] == "yes"
    assert main(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out


def test_doctor_says_what_is_missing_and_how_to_get_it(monkeypatch, capsys):
    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "av" else find(name))
    assert main(["doctor", "--json"]) == 0
    paths = dict(json.loads(capsys.readouterr().out)["paths"])
    assert "av missing" in paths["generate"] and "[pipeline]" in paths["generate"]


@pytest.mark.parametrize("memory", ["inf", "nan", "0", "-3"])
def test_a_card_without_a_size(memory, capsys):
    assert main(["plan", "--memory", memory]) == 2
    assert "GiB of a card" in capsys.readouterr().err
