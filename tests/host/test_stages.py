"""The stopwatch of a run: each step by itself, the rest beside them; and text that reaches the page."""

import re
import time
import types

import pytest
import torch


@pytest.fixture
def stages(pack):
    return pack.part("nodes.reports.stages").Stages(torch.device("cpu"))


def test_steps_are_timed_one_by_one_and_what_lies_between_is_not(stages, monkeypatch):
    clock = iter([1.0, 3.0, 10.0, 10.5, 12.0])  # step of 2, a pause, step of 0.5, the line
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    stages.begun = 0.0
    model = stages.timed(lambda x, sigma, scale=1: x * sigma * scale)
    assert model(2, 3, scale=5) == 30 and model(1, 1) == 1
    line = stages.line()
    assert line.startswith("2 steps in 2.5 s (2.0, 0.50), loading and the rest 9.5 s")


def test_peak_is_that_of_the_process_without_a_card(stages):
    stages.timed(lambda: None)()
    assert re.search(r"^1 step in .*, peak [\d.]+ [MG]B since ComfyUI started$", stages.line())


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_peak_without_the_dynamic_weights_says_so(stages, pack, monkeypatch, dynamic):
    """They lie where torch does not count them: of a 14B model 13 GB would be missing without a word."""
    module = pack.part("nodes.reports.stages")
    monkeypatch.setattr(module, "peak_memory", lambda device: {"device": 10**10})
    monkeypatch.setattr(module, "part_of_host", lambda *_: dynamic)
    stages.timed(lambda: None)()
    assert stages.line().endswith(f"peak 10.0 GB on the card{', dynamic weights not counted' if dynamic else ''}")


def test_text_goes_to_the_node_that_runs(pack, monkeypatch):
    module = pack.part("nodes.reports.show")
    sent = []
    instance = types.SimpleNamespace(send_progress_text=lambda text, node: sent.append((text, node)))
    monkeypatch.setattr(module, "PromptServer", types.SimpleNamespace(instance=instance))
    module.show(types.SimpleNamespace(hidden=types.SimpleNamespace(unique_id="7")), "hello")
    module.show(types.SimpleNamespace(hidden=None), "nobody")
    assert sent == [("hello", "7")]


LINE = r"TurboSampler: %d steps in [\d.]+ s \(.*\), loading and the rest [\d.]+ s, peak [\d.]+ [MG]B"


def test_a_run_says_its_time_and_memory_in_one_line(lab, caplog):
    caplog.set_level("INFO")
    lab.turbo(lab.load(), steps=3)
    assert sum(bool(re.search(LINE % 3, message)) for message in caplog.messages) == 1


def test_two_experts_are_one_run(lab, caplog):
    caplog.set_level("INFO")
    high, low = lab.load("TinyWan2.2-I2V-high.pth"), lab.load("TinyWan2.2-I2V-low.pth")
    lab.turbo(high, model_low=low, steps=4)
    assert sum(bool(re.search(LINE % 4, message)) for message in caplog.messages) == 1
