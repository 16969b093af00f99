"""The whole recipe at its smallest: every file is made, is what loaders take, and is measured."""

import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from turbo_core import checkpoint
from turbo_core.errors import TurboError
from turbo_core.text import encode_text, load_text_encoder
from turbo_core.train import evaluate, recipe, report
from turbo_core.vae import load_vae

COUNT = 2
ROWS = tuple(evaluate.ROWS[i] for i in (2, 8, 11))  # student, sparse, int8


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    recipe.train(folder, "try", log=lambda line: None)
    return folder


def test_every_file_is_what_the_loaders_take(family):
    for name, has_sla in (("teacher", False), ("student", False), ("turbo", True)):
        described = checkpoint.inspect(family / evaluate.FILES[name])
        assert (described.num_heads, described.text_dim, described.has_sla) == (2, 64, has_sla)
    load_vae(family / evaluate.FILES["vae"])
    model, tokenize = load_text_encoder(family / evaluate.FILES["text"])
    assert encode_text(model, tokenize, ["a red circle"]).shape == (1, 512, 64)


def test_a_second_call_trains_nothing(family, monkeypatch):
    monkeypatch.setattr(recipe.vae, "train", None)  # calling it would raise
    before = {file: file.stat().st_mtime_ns for file in family.iterdir()}
    recipe.train(family, "try", log=lambda line: None)
    assert before == {file: file.stat().st_mtime_ns for file in family.iterdir()}


def test_another_seed_wants_another_folder(family):
    with pytest.raises(TurboError, match="other settings"):
        recipe.train(family, "try", seed=1)
    with pytest.raises(TurboError, match="preset"):
        recipe.train(family, "none")


def test_the_report(family, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "FRAMES", 9)
    monkeypatch.setattr(evaluate, "SIDE", 64)
    found = evaluate.evaluate(family, tmp_path, COUNT, rows=ROWS[:1], log=lambda line: None)
    found = evaluate.evaluate(family, tmp_path, COUNT, rows=ROWS, log=lambda line: None)  # only what is missing
    assert [row["name"] for row in found] == ["VAE", *(row.name for row in ROWS)]
    assert all(0 <= row["low"] <= row["all"] <= row["high"] <= 1 for row in found)
    assert found == json.loads((tmp_path / "quality.json").read_text())
    assert report.markdown(found).count("\n") == len(found) + 2
    report.picture(found, family, tmp_path / "quality.png", prompts=1)
    assert (tmp_path / "quality.png").stat().st_size > 2000


def test_the_same_noise_for_every_row(family, monkeypatch):
    monkeypatch.setattr(evaluate, "FRAMES", 9)
    monkeypatch.setattr(evaluate, "SIDE", 64)
    row = evaluate.ROWS[2]
    model, _ = evaluate.load_row(family, row)
    context = torch.randn(1, 512, 64)
    one, other = (evaluate.sample_row(model, row, context, None, seed=3) for _ in range(2))
    assert torch.equal(one, other) and not torch.equal(one, evaluate.sample_row(model, row, context, None, seed=4))


def test_a_family_that_is_not_there(tmp_path):
    with pytest.raises(TurboError, match="lacks TinyWan2"):
        evaluate.evaluate(tmp_path, tmp_path / "out")
