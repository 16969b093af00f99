"""Which path is taken: a card stands in for itself, because none is here. Its probes are functions of these tests."""

import contextlib
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.triton_cpu.process import run_pytest
from turbo_core import dispatch, selfcheck
from turbo_core.bench.harness import EventClock
from turbo_core.diagnostics import doctor
from turbo_core.errors import TurboError
from turbo_core.int8 import reference

CARD = "cuda:0"


@pytest.fixture
def card(monkeypatch):
    """A card that could run kernels; card(function) makes function(device) the probe of "norm"."""
    monkeypatch.setattr(dispatch, "_cannot_run", lambda device: None)
    monkeypatch.setattr(dispatch, "answers", lambda device: True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(dispatch, "_found", {})
    monkeypatch.setattr(dispatch, "_logged", set())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card 24")
    return lambda function: monkeypatch.setitem(selfcheck.PROBES, "norm", function)


def fail(error):
    def run(device):
        raise error

    return run


def test_every_family_has_a_probe():
    assert tuple(selfcheck.PROBES) == dispatch.FAMILIES


def test_a_plain_cpu_computes_in_torch():
    for family in dispatch.FAMILIES:
        assert not dispatch.use_triton("cpu", family) and dispatch.why_not("cpu", family) == "no Triton kernels on cpu"
    assert not dispatch.use_triton("meta", "sla")


def test_the_switch(monkeypatch):
    monkeypatch.setenv(dispatch.SWITCH, "torch")
    dispatch._cannot_run.cache_clear()
    try:
        assert "TURBOWAN_KERNELS" in dispatch.why_not(CARD, "sla")
    finally:
        dispatch._cannot_run.cache_clear()


def test_a_probe_runs_once_with_the_kernels_on(card):
    seen = []

    def probed(device):
        seen.append((str(device), dispatch.use_triton(device, "norm")))
        with dispatch.without_kernels():
            seen.append(dispatch.use_triton(device, "norm"))

    card(probed)
    assert dispatch.use_triton(CARD, "norm") and dispatch.use_triton(torch.device(CARD), "norm")
    assert seen == [("cuda:0", True), False]
    with dispatch.without_kernels():
        assert not dispatch.use_triton(CARD, "norm")


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
        assert not any(dispatch.use_triton(CARD, "norm") for _ in range(3))
    assert words in dispatch.why_not(CARD, "norm")
    assert len(caplog.records) == 1 and words in caplog.text and "\n" not in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("tried to allocate 20 MiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),  # a module that does not fit
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_a_full_card_is_tried_again_after_a_minute(card, caplog, monkeypatch, error):
    tries, now = [], [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(dispatch, "answers", lambda device: False)  # not asked

    def full(device):
        tries.append(1)
        raise error

    card(full)
    with caplog.at_level(logging.WARNING):
        for seconds in (0, 30, 59):  # of one video: all of it on one path
            now[0] = 100.0 + seconds
            assert not dispatch.use_triton(CARD, "norm") and "memory" in dispatch.why_not(CARD, "norm")
        assert len(tries) == 1
        now[0] = 161.0
        assert not dispatch.use_triton(CARD, "norm")
    assert len(tries) == 2 and len(caplog.records) == 1
    card(lambda device: None)
    now[0] = 230.0
    assert dispatch.use_triton(CARD, "norm")
    now[0] = 1e9
    card(full)
    assert dispatch.use_triton(CARD, "norm")  # what passed stays


@pytest.mark.parametrize(
    ("error", "answer"),
    [
        (torch.OutOfMemoryError("no room for one element"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_a_full_card_answers_and_a_broken_one_does_not(monkeypatch, error, answer):
    monkeypatch.setattr(torch, "ones", lambda *args, **kwargs: fail(error)(None))
    assert dispatch.answers(torch.device("cpu")) is answer
    assert EventClock(torch.device("cpu")).answers() is answer


def test_a_broken_connection_is_said_not_survived(card, monkeypatch):
    monkeypatch.setattr(dispatch, "answers", lambda device: False)
    card(fail(RuntimeError("CUDA error: an illegal memory access was encountered")))
    with pytest.raises(TurboError, match="TURBOWAN_KERNELS=torch"):
        dispatch.use_triton(CARD, "norm")


def test_nothing_is_tried_while_a_graph_is_captured(card, monkeypatch):
    card(lambda device: "tried")
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    assert "graph" in dispatch.why_not(CARD, "norm")
    capturing[0] = False
    card(lambda device: None)
    assert dispatch.use_triton(CARD, "norm")
    capturing[0] = True
    assert dispatch.use_triton(CARD, "norm")  # known by now


def test_two_threads_try_once(card):
    tries, inside = [], threading.Event()

    def slow(device):
        tries.append(1)
        inside.set()
        time.sleep(0.2)  # the second thread comes meanwhile
        assert dispatch.use_triton(CARD, "norm")  # what a probe itself asks waits for nobody

    card(slow)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(dispatch.use_triton, CARD, "norm")
        assert inside.wait(10)
        second = pool.submit(dispatch.use_triton, CARD, "norm")
        assert first.result(10) and second.result(10)
    assert len(tries) == 1


def test_the_first_probe_of_a_process_says_what_takes_so_long(card, caplog, monkeypatch):
    card(lambda device: None)
    monkeypatch.setitem(selfcheck.PROBES, "sla", lambda device: None)
    with caplog.at_level(logging.INFO):
        assert dispatch.use_triton(CARD, "norm") and dispatch.use_triton(CARD, "sla")
    assert len(caplog.records) == 1 and "compiling and testing kernels for Some Card 24" in caplog.text


@pytest.mark.parametrize(
    ("chip", "runs"),
    [
        ("gfx1030", False),  # RDNA 2: its int8 products hang
        ("gfx1012:xnack-", False),
        ("gfx906:sramecc+:xnack-", False),
        ("gfx90a:sramecc+:xnack-", True),
        ("gfx942", True),
        ("gfx1100", True),
        ("gfx1201", True),
    ],
)
def test_amd_chips_without_matrix_instructions_compute_in_torch(monkeypatch, chip, runs):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=chip))
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    monkeypatch.delenv(dispatch.SWITCH, raising=False)
    reason = dispatch._cannot_run.__wrapped__(torch.device(CARD))
    assert (reason is None) if runs else (chip.split(":")[0] in reason)


def test_torch_compile_asks_and_does_not_trace(card):
    card(lambda device: None if torch.ones(3).sum().item() == 3 else "traced")  # .item() would break the graph

    @torch.compile(fullgraph=True, backend="eager")
    def run(x):
        return x + 1 if dispatch.use_triton(CARD, "norm") else x

    assert run(torch.zeros(1)).item() == 1


def test_what_a_probe_calls_different():
    x = torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
    assert selfcheck._difference(x.clone(), x, None) is None
    assert selfcheck._difference((x, None), (x.clone(), None), None) is None
    assert selfcheck._difference(x * (1 + 1e-6), x, None) is None
    wrong = x.clone()
    wrong[5, 7] += 0.1  # one value of 12,800: 1e-3 of the whole
    with_nan = x.clone()
    with_nan[0, 0] = torch.nan
    for other in (wrong, with_nan, x.roll(1, 0), x[:-1], x.double()):
        assert selfcheck._difference(other, x, None)
    q = (10 * x).to(torch.int8)
    flipped = q.clone()
    flipped.view(-1)[::128] += 1  # 100 of 12,800 rounded the other way
    assert selfcheck._difference(flipped, q, None) is None
    flipped.view(-1)[:200] += 1
    assert "by up to 2" in selfcheck._difference(flipped, q, None)
    in_one_row = q.clone()
    in_one_row[3, :100] += 1  # as few, but half of a row: its scale is wrong
    assert selfcheck._difference(in_one_row, q, None)
    assert selfcheck._difference((x, x), (x, None), None)


def test_a_small_row_beside_a_large_one_counts_by_itself():
    x = torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
    x[2] *= 300
    x[4] = 0
    assert selfcheck._difference(x.clone(), x, None) is None
    wrong = x.clone()
    wrong[5] += 0.1  # 1e-4 of the largest value, 3e-4 of the whole
    assert "worst row" in selfcheck._difference(wrong, x, 1e-3)
    wrong = x.clone()
    wrong[4, 0] = 1.0  # where the twin has zeros
    assert selfcheck._difference(wrong, x, 1e-3)


def test_row_statistics_count_apart():
    """M2 of a large row is ten thousand times what means are: in one norm of both, no mean matters."""
    x = selfcheck._draw(134, 200)
    stats = reference.row_stats(x)
    as_rounded = reference.row_stats(x + 1e-4 * x.sign())
    assert selfcheck._difference(stats.clone(), stats, None) is None
    assert selfcheck._difference(as_rounded, stats, None) is None
    for part, change in ((0, -1), (0, 0), (0, 1.05), (1, 0), (1, 1.05), (1, torch.nan)):
        wrong = stats.clone()
        wrong[..., part] *= change
        assert selfcheck._difference(wrong, stats, None), (part, change)
    wrong = stats.clone()
    wrong[1, 7, 0] *= -1  # of one row and span
    assert "means" in selfcheck._difference(wrong, stats, None)


@pytest.mark.parametrize("kind", ["interpreted", "compiled"])
def test_probes(kind):
    pytest.importorskip("triton", reason="the Triton tests need triton (pip install triton)")
    run_pytest(Path(__file__).with_name("kernels") / f"probes_{kind}.py", interpret=kind == "interpreted")


def test_the_doctor_says_which_path_and_why(monkeypatch):
    monkeypatch.setattr(doctor, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(doctor, "int_mm_pays", lambda device: False)
    assert dict(doctor.examine()["paths"])["int8 linear"].startswith("float32 products")
    monkeypatch.setattr(doctor, "int_mm_pays", lambda device: True)
    found = dict(doctor.examine()["paths"])
    assert found["norms"] == "PyTorch, in float32; no Triton kernels on cpu"
    assert found["sparse attention"].endswith("; no Triton kernels on cpu")
    assert found["int8 Wan block"] == "layer by layer" and found["int8 linear"].startswith("torch._int_mm")
    for module in (dispatch, doctor):
        monkeypatch.setattr(module, "why_not", lambda device, family: None)
    found = dict(doctor.examine()["paths"])
    assert {found[name] for name in ("int8 linear", "norms", "sparse attention")} == {"Triton kernels"}
    assert found["int8 Wan block"].startswith("fused")
