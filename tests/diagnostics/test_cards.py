"""What is said of cards: the planner's bytes, the forecast's seconds, and nothing where neither knows the card."""

import re

import pytest

from turbo_core.cli import main
from turbo_core.diagnostics import cards
from turbo_core.diagnostics.steps import SECONDS
from turbo_core.pipeline import plan


@pytest.mark.parametrize("file, kind, width, height", cards.VIDEOS)
def test_a_video_is_what_the_plan_says(file, kind, width, height, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")  # a sentence on one line
    options = ["--topk", str(cards.TOPK), "--precision", cards.PRECISION]
    assert main(["plan", "--model", kind, "--size", f"{width}x{height}", *options]) == 0
    said = re.findall(r"sampling\W+([\d.]+) \+ ([\d.]+) GiB\W+(.*)", capsys.readouterr().out)
    assert len(said) == len(plan.CARDS)
    for memory, (weights, activations, verdict) in zip(plan.CARDS, said):
        fit = next(f for f in cards.fits(memory) if (f.file, f.size) == (file, f"{width}x{height}"))
        kept = re.search(r"([\d.]+) of", verdict)
        experts = re.search(r"with (one expert|both experts)", verdict)
        assert fit.stays == (f"{kept[1]} GiB" if kept else experts[1] if experts else "all")
        assert f"{weights} + {activations} GiB" in dict(cards.on_card("a card", memory))[f"{file} {fit.size}"]


def test_seconds_are_the_forecast_of_four_steps_and_what_is_fetched_takes_its_time(monkeypatch):
    of = {(fit.file, fit.size): fit.seconds for fit in cards.fits(32, "RTX 5090")}
    assert of["T2V 14B", "1280x720"] == 4 * SECONDS["RTX 5090", "t2v-14b", "1280x720"]
    small = next(fit for fit in cards.fits(8, "RTX 5090") if fit.file == "T2V 14B")
    fetched = small.sampling.weights - small.sampling.kept
    assert fetched > 9e9 and small.seconds == 4 * SECONDS["RTX 5090", "t2v-14b", "832x480"]
    monkeypatch.setattr(cards, "FETCHED", 1e9)
    small = next(fit for fit in cards.fits(8, "RTX 5090") if fit.file == "T2V 14B")
    assert small.seconds == pytest.approx(4 * fetched / 1e9)


@pytest.mark.parametrize(
    "name, known",
    [
        ("NVIDIA GeForce RTX 4090", True),
        ("NVIDIA H200", True),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", False),  # another chip under the same number
        ("NVIDIA GeForce RTX 4090 D", False),
        ("AMD Radeon RX 7900 XTX", False),
    ],
)
def test_only_cards_that_are_forecast_get_seconds(name, known):
    rows = dict(cards.on_card(name, 23.5))
    assert "nothing here was measured" in rows["forecast"]
    assert bool(re.search(r"; [\d.]+ s$", rows["T2V 1.3B 832x480"])) == known
    assert ("no seconds are forecast" in rows["forecast"]) != known
    assert list(rows)[-4:] == ["begin with", "text encoder", "decoding", "attention"]


def test_a_card_too_small_is_told_and_no_card_too():
    import torch

    assert "too little" in dict(cards.on_card("NVIDIA T400", 2.0))["forecast"]
    assert "TinyWan" in dict(cards.here(torch.device("cpu")))["none"]
    assert dict(cards.on_card("a card", 5))["T2V 14B 1280x720"].endswith("does not fit: make fewer frames")
