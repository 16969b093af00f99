"""Kernels are held to their references once, when somebody asks; what the checks compute is tested in tests/kernels."""

import logging

import pytest
import torch

from tests.helpers.tensors import gaussian
from turbo_core import dispatch, selfcheck
from turbo_core.bench.harness import EventClock
from turbo_core.errors import TurboError
from turbo_core.int8 import reference

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("tried to allocate 20 MiB"),
    RuntimeError("Triton Error [CUDA]: out of memory"),  # a module that does not fit
    RuntimeError("CUDA error: out of memory"),
]
BROKEN = RuntimeError("CUDA error: an illegal memory access was encountered")


def fail(error):
    def run(*_, **__):
        raise error

    return run


@pytest.fixture
def checked(card, monkeypatch):
    """checked(function, family) makes function(device) the check of a family; returns those that were run."""
    ran = []
    monkeypatch.setattr(selfcheck, "answers", lambda device: True)

    def check(function=lambda device: None, family="norm"):
        monkeypatch.setitem(selfcheck.CHECKS, family, lambda device: ran.append(family) or function(device))
        return ran

    for family in dispatch.FAMILIES:
        check(family=family)
    return check


def test_every_family_has_a_check():
    assert tuple(selfcheck.CHECKS) == dispatch.FAMILIES


def test_each_family_is_checked_once_and_computes_from_then_on(card, checked):
    ran = checked(lambda device: "it is wrong", "sla")
    assert selfcheck.prove("cuda", ("norm", "sla")) == {"norm": None, "sla": "it is wrong"}
    assert ran == ["norm", "sla"] and not dispatch.use_triton(card, "int8_mm")
    assert selfcheck.prove(card) == {"quantize": None, "norm": None, "int8_mm": None, "sla": "it is wrong", "vae": None}
    assert ran == ["norm", "sla", "quantize", "int8_mm", "vae"]
    assert [dispatch.use_triton(card, family) for family in dispatch.FAMILIES] == [True, True, True, False, True]


def test_a_check_learns_nothing(card, checked):
    checked(lambda device: "with gradients" if torch.is_grad_enabled() else None)
    assert selfcheck.prove(card, ("norm",)) == {"norm": None}


@pytest.mark.parametrize(
    ("check", "words"),
    [
        (lambda device: "rms_norm is not what PyTorch computes", "rms_norm is not"),
        (fail(RuntimeError("PassManager::run failed\nand much more")), "RuntimeError: PassManager::run failed"),
        (fail(ModuleNotFoundError("")), "ModuleNotFoundError"),
    ],
)
def test_a_kernel_that_is_wrong_costs_speed_and_one_line(card, checked, caplog, check, words):
    ran = checked(check)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert words in selfcheck.prove(card, ("norm",))["norm"]
            assert not dispatch.use_triton(card, "norm")
    assert ran == ["norm"] and words in dispatch.why_not(card, "norm")
    assert len(caplog.records) == 1 and words in caplog.text and "\n" not in caplog.records[0].getMessage()


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_full_card_is_tried_again_by_the_next_proof(card, checked, caplog, monkeypatch, error):
    monkeypatch.setattr(selfcheck, "answers", lambda device: False)  # not asked
    ran = checked(fail(error))
    with caplog.at_level(logging.WARNING):
        assert "memory" in selfcheck.prove(card, ("norm",))["norm"]
        for _ in range(3):  # a video: all of it on one path
            assert not dispatch.use_triton(card, "norm") and "memory" in dispatch.why_not(card, "norm")
        assert ran == ["norm"]
        selfcheck.prove(card, ("norm",))
    assert ran == ["norm"] * 2 and len(caplog.records) == 1
    checked()
    assert selfcheck.prove(card, ("norm",)) == {"norm": None} and dispatch.use_triton(card, "norm")
    checked(fail(error))
    assert selfcheck.prove(card, ("norm",)) == {"norm": None} and len(ran) == 3  # what passed stays


@pytest.mark.parametrize(("error", "answer"), [*((error, True) for error in OUT_OF_MEMORY), (BROKEN, False)])
def test_a_full_card_answers_and_a_broken_one_does_not(monkeypatch, error, answer):
    monkeypatch.setattr(torch, "ones", fail(error))
    assert selfcheck.answers(torch.device("cpu")) is answer
    assert EventClock(torch.device("cpu")).answers() is answer


def test_a_broken_connection_is_said_not_survived(card, checked, monkeypatch):
    monkeypatch.setattr(selfcheck, "answers", lambda device: False)
    checked(fail(BROKEN))
    with pytest.raises(TurboError, match=r"norm kernel broke the connection to cuda:0.*TURBOWAN_KERNELS=torch"):
        selfcheck.prove(card)


def test_the_first_proof_of_a_process_says_what_takes_so_long(card, checked, caplog):
    with caplog.at_level(logging.INFO):
        selfcheck.prove(card)
    assert len(caplog.records) == 1 and "compiling and testing kernels for Some Card 24" in caplog.text


def test_where_kernels_cannot_run_none_is_tried(card, checked, monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "cannot_run", lambda device: "the card is too old")
    ran = checked()
    assert selfcheck.prove(card) == dict.fromkeys(dispatch.FAMILIES, "the card is too old")
    assert not ran and not caplog.records


def test_kernels_that_were_asked_for_are_not_tried(card, checked, monkeypatch):
    monkeypatch.setenv(dispatch.SWITCH, "triton")
    ran = checked(lambda device: "it is wrong")
    assert selfcheck.prove(card) == dict.fromkeys(dispatch.FAMILIES)
    assert not ran and dispatch.use_triton(card, "norm")


def test_what_a_check_calls_different():
    x = gaussian(64, 200)
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
    x = gaussian(64, 200)
    x[2] *= 300
    x[4] = 0
    assert selfcheck._difference(x.clone(), x, None) is None
    wrong = x.clone()
    wrong[5] += 0.1  # 1e-4 of the largest value, 3e-4 of the whole
    assert "worst row" in selfcheck._difference(wrong, x, 1e-3)
    wrong = x.clone()
    wrong[4, 0] = 1.0  # where the reference has zeros
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
