"""Where the kernels of sparse attention hand over to torch, and with whom; runs under TRITON_INTERPRET=1."""

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.poison import poisoned
from tests.triton_cpu.interpreter import repair

repair()

from tests.kernels.sla_attends import recorded  # noqa: E402
from turbo_core import sla  # noqa: E402
from turbo_core.errors import TurboError  # noqa: E402
from turbo_core.int8 import dequantize_block  # noqa: E402
from turbo_core.kernels import block_map, launch  # noqa: E402
from turbo_core.sla import blocks, fast  # noqa: E402


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """One entry for each attention that the kernels computed."""
    return recorded(monkeypatch)


def draw(length, h=1, d=64, dtype=torch.float32):
    return torch.randn(3, 1, length, h, d, generator=torch.Generator().manual_seed(0)).to(dtype)


def projection(d):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(d, d, generator=generator) / d**0.5, torch.randn(d, generator=generator)


def raw(length, h=1, d=64):
    """(qkv, sums, norm weights, eps, cos, sin), the operands of sla_from_qkv up to proj_l."""
    generator = torch.Generator().manual_seed(2)
    weights = [1 + 0.3 * torch.randn(h * d, generator=generator) for _ in range(2)]
    angles = 6 * torch.rand(length, d // 2, generator=generator)
    return draw(length, h, d), None, *weights, 1e-6, angles.cos(), angles.sin()


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# float32 goes in tiles of 64 queries without low bits: one scale block too many at 130 tokens, two at 256
@pytest.mark.parametrize("length", [130, 256])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_int8_output_of_float32(launched, length, precision):
    given = *raw(length, d=128), *projection(128), 0.5, precision
    with poisoned():
        q8, scale = sla.sla_from_qkv(*given, quantize=True)
    out = sla.sla_from_qkv(*given).view(length, -1)
    assert len(launched) == 2 and scale.shape == (2, 1)
    assert ((dequantize_block(q8, scale) - out).abs() <= 0.52 * scale.repeat_interleave(128, 0)[:length]).all()


def test_float32_goes_to_torch_on_a_card(monkeypatch):
    monkeypatch.setattr(sla, "use_triton", lambda *_: True)
    with FakeTensorMode():
        for dtype, device, by_kernels in (
            (torch.float32, "cuda", False),
            (torch.bfloat16, "cuda", True),
            (torch.float32, "cpu", True),
        ):
            assert sla._by_kernels(torch.empty(1, 1, 1, 64, dtype=dtype, device=device)) == by_kernels


# autocast would make the folded projection bf16, which the kernel refuses, and scores too coarse to choose by
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_autocast_changes_nothing(launched, precision):
    q, k, v = draw(200, dtype=torch.bfloat16)
    given = *projection(64), 0.5
    alone = sla.sparse_linear_attention(q, k, v, *given, precision=precision)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sla.sparse_linear_attention(q, k, v, *given, precision=precision)
    assert torch.equal(out, alone) and len(launched) == 2


def test_autocast_does_not_choose_other_blocks():
    q, k = draw(64 * 40)[:2]
    alone = blocks.top_map(q, k, 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(blocks.top_map(q, k, 0.3), alone)


def test_where_only_the_bias_learns(launched):
    weight, bias = projection(64)
    bias.requires_grad_()
    sla.sparse_linear_attention(*draw(65), weight, bias, 0.5).sum().backward()
    assert torch.allclose(bias.grad, torch.full((64,), 65.0)) and not launched


# positions in sla_from_qkv's operands: a norm weight, the sines, proj_l's bias
@pytest.mark.parametrize("learner", [2, 6, 8])
def test_where_one_operand_of_the_raw_form_learns(launched, learner):
    given = [*raw(65), *projection(64), 0.5]
    given[learner].requires_grad_()
    (sla.sla_from_qkv(*given) * draw(65)[0]).sum().backward()
    assert given[learner].grad.abs().sum() > 0 and not launched


def test_gradients_under_compile():
    weight, bias = projection(64)
    norm_q, norm_k = (x.requires_grad_() for x in raw(65)[2:4])
    plain, packed = draw(65), raw(65)
    bias.requires_grad_()

    def attend():
        one = sla.sparse_linear_attention(*plain, weight, bias, 0.5)
        return one + sla.sla_from_qkv(*packed[:2], norm_q, norm_k, *packed[4:], weight, bias, 0.5)

    grads = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        (function() * plain[0]).sum().backward()
        grads.append([x.grad for x in (bias, norm_q, norm_k)])
        for x in (bias, norm_q, norm_k):
            x.grad = None
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_rows_too_long_for_the_kernel_are_torchs(launched, monkeypatch, caplog):
    q, k, v = draw(300, h=2)  # five key blocks
    given = q, k, v, *projection(64), 0.5
    expected = sla.sparse_linear_attention(*given)
    monkeypatch.setattr(block_map, "MOST_BLOCKS", 4)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert torch.equal(sla.sparse_linear_attention(*given), expected)
    assert len(launched) == 3
    assert [record.getMessage() for record in caplog.records if "5 key blocks" in record.getMessage()] != []
    assert len(caplog.records) == 1


def test_a_kernel_that_does_not_start_is_explained(monkeypatch):
    def broken(*_, **__):
        raise launch.LaunchError("attention_kernel cannot run")

    monkeypatch.setattr(fast, "attend", broken)
    calls = [
        lambda: sla.sparse_linear_attention(*draw(65), *projection(64), 0.5),
        lambda: sla.sla_from_qkv(*raw(65), *projection(64), 0.5),
        lambda: sla.sla_from_qkv(*raw(65), *projection(64), 0.5, quantize=True),
    ]
    for call in calls:
        with pytest.raises(TurboError, match=r"attention_kernel cannot run.*TURBOWAN_KERNELS=torch"):
            call()


@pytest.mark.parametrize("eps", [0.0, -1e-6, float("nan")])
def test_eps_that_divides_by_nothing_is_refused(eps):
    qkv, sums, norm_q, norm_k, _, cos, sin = raw(65)
    with pytest.raises(TurboError, match="eps of RMSNorm must be above 0"):
        sla.sla_from_qkv(qkv, sums, norm_q, norm_k, eps, cos, sin, None, None, 0.5)
