"""Which path is taken: a card stands in for itself, because none is here. Its probes are functions of these tests."""

import logging
from pathlib import Path

import pytest
import torch

from tests.triton_cpu.process import run_pytest
from turbo_core import doctor, paths, probe
from turbo_core.errors import TurboError

CARD = "cuda:0"


@pytest.fixture
def card(monkeypatch):
    """A card that could run kernels; card(function) makes function(device) the probe of "norm"."""
    monkeypatch.setattr(paths, "_cannot_run", lambda device: None)
    monkeypatch.setattr(paths, "_answers", lambda device: True)
    monkeypatch.setattr(paths, "_found", {})
    monkeypatch.setattr(paths, "_logged", set())
    return lambda function: monkeypatch.setitem(probe.PROBES, "norm", function)


def fail(error):
    def run(device):
        raise error

    return run


def test_every_family_has_a_probe():
    assert tuple(probe.PROBES) == paths.FAMILIES


def test_a_plain_cpu_computes_in_torch():
    for family in paths.FAMILIES:
        assert not paths.use_triton("cpu", family) and paths.why_not("cpu", family) == "no Triton kernels on cpu"
    assert not paths.use_triton("meta", "sla")


def test_the_switch(monkeypatch):
    monkeypatch.setenv(paths.SWITCH, "torch")
    paths._cannot_run.cache_clear()
    try:
        assert "TURBOWAN_KERNELS" in paths.why_not(CARD, "sla")
    finally:
        paths._cannot_run.cache_clear()


def test_a_probe_runs_once_with_the_kernels_on(card):
    seen = []

    def probed(device):
        seen.append((str(device), paths.use_triton(device, "norm")))
        with paths.without_kernels():
            seen.append(paths.use_triton(device, "norm"))

    card(probed)
    assert paths.use_triton(CARD, "norm") and paths.use_triton(torch.device(CARD), "norm")
    assert seen == [("cuda:0", True), False]
    with paths.without_kernels():
        assert not paths.use_triton(CARD, "norm")


@pytest.mark.parametrize(
    ("probed", "words"),
    [
        (lambda device: "rms_norm is not what PyTorch computes", "rms_norm is not"),
        (fail(RuntimeError("PassManager::run failed\nand much more")), "RuntimeError: PassManager::run failed"),
        (fail(ModuleNotFoundError("")), "ModuleNotFoundError"),
    ],
)
def test_a_failed_probe_means_torch_and_one_line(card, caplog, probed, words):
    card(probed)
    with caplog.at_level(logging.WARNING):
        assert not any(paths.use_triton(CARD, "norm") for _ in range(3))
    assert words in paths.why_not(CARD, "norm")
    assert len(caplog.records) == 1 and words in caplog.text and "\n" not in caplog.records[0].getMessage()


def test_a_full_card_is_tried_again(card, caplog):
    tries = []

    def full(device):
        tries.append(1)
        raise torch.OutOfMemoryError("tried to allocate 20 MiB")

    card(full)
    with caplog.at_level(logging.WARNING):
        assert not paths.use_triton(CARD, "norm") and "memory" in paths.why_not(CARD, "norm")
    assert len(tries) == 2 and len(caplog.records) == 1
    card(lambda device: None)
    assert paths.use_triton(CARD, "norm")


def test_a_broken_connection_is_said_not_survived(card, monkeypatch):
    monkeypatch.setattr(paths, "_answers", lambda device: False)
    card(fail(RuntimeError("CUDA error: an illegal memory access was encountered")))
    with pytest.raises(TurboError, match="TURBOWAN_KERNELS=torch"):
        paths.use_triton(CARD, "norm")


def test_torch_compile_asks_and_does_not_trace(card):
    card(lambda device: None if torch.ones(3).sum().item() == 3 else "traced")  # .item() would break the graph

    @torch.compile(fullgraph=True, backend="eager")
    def run(x):
        return x + 1 if paths.use_triton(CARD, "norm") else x

    assert run(torch.zeros(1)).item() == 1


def test_what_a_probe_calls_different():
    x = torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
    assert probe._difference(x.clone(), x, None) is None
    assert probe._difference((x, None), (x.clone(), None), None) is None
    assert probe._difference(x * (1 + 1e-6), x, None) is None
    wrong = x.clone()
    wrong[5, 7] += 0.1  # one value of 12,800: 1e-3 of the whole
    with_nan = x.clone()
    with_nan[0, 0] = torch.nan
    for other in (wrong, with_nan, x.roll(1, 0), x[:-1], x.double()):
        assert probe._difference(other, x, None)
    q = (10 * x).to(torch.int8)
    flipped = q.clone()
    flipped.view(-1)[:100] += 1  # 100 of 12,800 rounded the other way
    assert probe._difference(flipped, q, None) is None
    flipped.view(-1)[:200] += 1
    assert "by up to 2" in probe._difference(flipped, q, None)
    assert probe._difference((x, x), (x, None), None)


def test_probes_through_the_interpreter():
    pytest.importorskip("triton", reason="the Triton tests need triton (pip install triton)")
    run_pytest(Path(__file__).with_name("kernels") / "probes_interpreted.py", interpret=True)


def test_the_doctor_says_which_path_and_why(monkeypatch):
    monkeypatch.setattr(doctor, "pick_device", lambda: torch.device("cpu"))
    found = dict(doctor.examine()["paths"])
    assert found["norms"] == "PyTorch, in float32; no Triton kernels on cpu"
    assert found["sparse attention"].endswith("; no Triton kernels on cpu")
    assert found["int8 Wan block"] == "layer by layer" and found["int8 linear"].startswith("torch._int_mm")
    for module in (paths, doctor):
        monkeypatch.setattr(module, "why_not", lambda device, family: None)
    found = dict(doctor.examine()["paths"])
    assert {found[name] for name in ("int8 linear", "norms", "sparse attention")} == {"Triton kernels"}
    assert found["int8 Wan block"].startswith("fused")
