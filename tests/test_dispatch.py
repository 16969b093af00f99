"""Which code computes: operations read the verdict, and where there is none they compute in torch and try nothing."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.int8_operands import quantized
from tests.helpers.qkv import qkv
from tests.helpers.tensors import gaussian
from turbo_core import dispatch, int8, selfcheck, sla
from turbo_core.errors import TurboError
from turbo_core.wan import RMSNorm, fused

CPU = torch.device("cpu")


def test_a_plain_cpu_computes_in_torch():
    for family in dispatch.FAMILIES:
        assert not dispatch.use_triton(CPU, family) and dispatch.why_not("cpu", family) == "no Triton kernels on cpu"
    assert not dispatch.use_triton(torch.device("meta"), "sla")


def test_the_verdict_of_one_family_is_that_of_no_other(card):
    dispatch.record(card, "norm", None)
    dispatch.record(card, "sla", "it is wrong")
    assert [dispatch.use_triton(card, family) for family in dispatch.FAMILIES] == [False, True, False, False, False]
    assert dispatch.why_not(card, "norm") is None and dispatch.why_not(card, "sla") == "it is wrong"
    assert [dispatch.is_decided(card, family) for family in dispatch.FAMILIES] == [False, True, False, True, False]
    assert not dispatch.use_triton(torch.device("cuda:1"), "norm")


def test_a_card_without_its_number_is_the_current_one(card):
    dispatch.record("cuda", "norm", None)
    assert dispatch.use_triton(card, "norm") and dispatch.why_not("cuda", "norm") is None


def test_an_unproved_card_computes_in_torch_and_says_so_once(card, caplog):
    with caplog.at_level(logging.INFO):
        assert not any(dispatch.use_triton(card, family) for family in dispatch.FAMILIES * 2)
    (line,) = (record.getMessage() for record in caplog.records)
    assert "not used on cuda:0" in line and "turbo_core.selfcheck.prove(device)" in line
    assert dispatch.why_not(card, "sla") == dispatch.UNPROVED


def test_the_switch_turns_kernels_off(monkeypatch, caplog):
    monkeypatch.setenv(dispatch.SWITCH, "torch")
    monkeypatch.setattr(dispatch, "cannot_run", dispatch.cannot_run.__wrapped__)
    card = torch.device("cuda:0")
    dispatch._tell_unproved.cache_clear()
    assert not dispatch.use_triton(card, "sla") and not caplog.records
    assert dispatch.why_not(card, "sla") == "turned off by TURBOWAN_KERNELS=torch"


def test_the_switch_takes_kernels_without_proof(card, monkeypatch, caplog):
    monkeypatch.setenv(dispatch.SWITCH, "triton")
    assert all(dispatch.use_triton(card, family) for family in dispatch.FAMILIES)
    monkeypatch.setattr(dispatch, "cannot_run", lambda device: "too old")
    other = torch.device("cuda:1")
    assert not dispatch.use_triton(other, "sla") and dispatch.why_not(other, "sla") == "too old"
    assert not caplog.records


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
    reason = dispatch.cannot_run.__wrapped__(torch.device("cuda:0"))
    assert (reason is None) if runs else (chip.split(":")[0] in reason)


@pytest.mark.parametrize(
    ("capability", "has_triton", "words"),
    [((7, 5), True, "older than compute capability 8.0"), ((8, 0), True, None), ((8, 6), False, "triton-windows")],
)
def test_old_cards_and_those_without_triton_compute_in_torch(monkeypatch, capability, has_triton, words):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(dispatch, "_has_triton", lambda: has_triton)
    monkeypatch.delenv(dispatch.SWITCH, raising=False)
    reason = dispatch.cannot_run.__wrapped__(torch.device("cuda:0"))
    assert (reason is None) if words is None else (words in reason)


@pytest.mark.parametrize("proved", [True, False])
def test_a_compiled_graph_reads_the_verdict(card, caplog, proved):
    if proved:
        dispatch.record(card, "norm", None)

    @torch.compile(fullgraph=True, backend="eager")
    def run(x):
        return x + 1 if dispatch.use_triton(card, "norm") else x

    assert run(torch.zeros(1)).item() == proved and "TurboWan" not in caplog.text


@pytest.fixture
def nothing_tried(monkeypatch):
    """Fails what imports a kernel or begins a proof."""
    for room in (int8, sla):
        monkeypatch.setitem(sys.modules, f"{room.__name__}.fast", None)
        monkeypatch.delattr(room, "fast", raising=False)
    for family in dispatch.FAMILIES:
        monkeypatch.setitem(selfcheck.CHECKS, family, lambda device: pytest.fail("a proof nobody asked for"))


def everything():
    """Every operation once, on the CPU; nobody can compute on a card that is a name alone."""
    q, k, v = qkv(65)
    x = gaussian(5, 200)
    int8.quantize_block(x)
    int8.quantize_rows(x)
    int8.int8_linear(x, *quantized("row", 64, 200, 1))
    sla.sparse_linear_attention(q, k, v, None, None, 0.5)
    sla.sla_from_qkv(torch.stack([q, k, v]), None, None, None, 1e-6, None, None, None, None, 0.5)
    RMSNorm(200, 1e-6).requires_grad_(False)(x[None])


def a_query(device, dtype=torch.bfloat16):
    return SimpleNamespace(dtype=dtype, device=device, requires_grad=False)


def test_no_operation_tries_a_kernel_of_its_own_accord(card, nothing_tried):
    with torch.no_grad():
        everything()
    assert int8.operations(card) is int8.reference and sla.operations(a_query(card)) is sla.reference
    assert not fused.pays(card)
    for family in dispatch.FAMILIES:
        dispatch.record(card, family, None)
    assert fused.pays(card)
    with pytest.raises(ImportError):  # what was poisoned is what a verdict leads to
        int8.operations(card)
    with pytest.raises(ImportError):
        sla.operations(a_query(card))


def test_where_something_learns_it_is_torch_whatever_the_verdict(card, nothing_tried):
    for family in dispatch.FAMILIES:
        dispatch.record(card, family, None)
    learns = torch.zeros(1, requires_grad=True)
    assert int8.operations(card, dispatch.FAMILIES, None, learns) is int8.reference
    assert sla.operations(torch.zeros(1), None, learns) is sla.reference


def test_float32_attention_is_torch_on_a_card(card, nothing_tried):
    dispatch.record(card, "sla", None)
    assert sla.operations(a_query(card, torch.float32)) is sla.reference


def test_a_kernel_that_does_not_start_is_told_with_its_cure(monkeypatch):
    class LaunchError(RuntimeError):
        pass

    monkeypatch.setitem(sys.modules, "turbo_core.kernels.launch", SimpleNamespace(LaunchError=LaunchError))
    cure = r"no registers.*Cure: .*TURBOWAN_KERNELS=torch.*your card and driver"
    with pytest.raises(TurboError, match=cure), dispatch.explained():
        raise LaunchError("no registers")
    with pytest.raises(ValueError, match="as it was"), dispatch.explained():
        raise ValueError("as it was")
