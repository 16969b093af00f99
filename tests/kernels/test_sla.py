"""Whole sparse-linear attention of turbo_core by the kernels, against its reference; where it hands over to torch."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.attention_inputs import draw, projection, raw_form
from tests.helpers.tensors import relative
from turbo_core import sla
from turbo_core.errors import TurboError
from turbo_core.int8 import dequantize_block
from turbo_core.kernels import block_map, launch, sla_attention
from turbo_core.sla import blocks, fast, paths, reference


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """One entry for each attention that the kernels computed."""
    calls, real = [], sla_attention.attention

    def attention(q, *given, **named):
        calls.append(tuple(q.shape))
        return real(q, *given, **named)

    monkeypatch.setattr(sla_attention, "attention", attention)
    return calls


def by_torch(q, k, v, proj, topk, precision, coverage=None):
    return reference.sparse_linear_attention(q, k, v, *proj, topk, coverage, 128, 64, precision)


def raw(length, b=1, h=1, d=64, dtype=torch.float32):
    """(qkv, sums, norm weights, eps, cos, sin), the operands of sla_from_qkv up to proj_l."""
    q, k, v = draw(length, b=b, h=h, d=d, dtype=dtype)
    return torch.stack([q, k, v]), *raw_form(q, k, eps=1e-2)[0]


# float32 shows what the kernels do differently; bf16 adds the rounding of the two results
TOLERANCE = {
    ("bf16", torch.float32): 1e-3,
    ("bf16", torch.bfloat16): 6e-3,
    ("int8", torch.float32): 2e-2,
    ("int8", torch.bfloat16): 2e-2,
    ("bf16", torch.float16): 1e-3,
    ("int8", torch.float16): 2e-2,
}


# 130 tokens: two query blocks, the second of two tokens, three key blocks, the last of two; 200: ragged in both
FORMS = [
    (2, 130, 64, 0.1, None, torch.float32, True),
    (1, 200, 128, 0.5, None, torch.bfloat16, True),
    (1, 200, 64, 0.5, None, torch.float16, False),
    (1, 130, 128, 1.0, None, torch.float32, True),
    (1, 130, 64, 1.0, None, torch.float32, False),
    (2, 200, 64, 0.1, 0.5, torch.float32, True),
]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("b, length, d, topk, coverage, dtype, linear", FORMS)
def test_agrees_with_the_reference(launched, b, length, d, topk, coverage, dtype, linear, precision):
    q, k, v = draw(length, b=b, h=128 // d, d=d, dtype=dtype)
    proj = projection(d) if linear else (None, None)
    out = sla.sparse_linear_attention(q, k, v, *proj, topk, precision=precision, coverage=coverage)
    assert out.dtype == dtype and out.shape == q.shape
    error = relative(out, by_torch(q, k, v, proj, topk, precision, coverage))
    print(f"{precision} {dtype} L {length} D {d} top-k {topk} coverage {coverage} linear {linear}: {error:.2e}")
    assert error < TOLERANCE[precision, dtype]
    dense_by_torch = topk == 1.0 and precision == "bf16" and not linear
    assert len(launched) == (0 if dense_by_torch else 1)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_two_runs_are_bit_identical(precision):
    given = *draw(200, dtype=torch.bfloat16), *projection(64), 0.5
    a, b = (sla.sparse_linear_attention(*given, precision=precision) for _ in range(2))
    assert torch.equal(a, b)


def test_below_fp8_values_are_float16(monkeypatch):
    q, k, v = draw(130, h=1, d=128, dtype=torch.bfloat16)
    expected = by_torch(q.float(), k.float(), v.float(), projection(128), 0.5, "bf16")
    errors = []
    for fp8 in (True, False):
        monkeypatch.setattr(fast, "has_fp8", lambda device, fp8=fp8: fp8)
        out = sla.sparse_linear_attention(q, k, v, *projection(128), 0.5, precision="int8")
        errors.append(relative(out, expected))
    assert errors[1] < 0.75 * errors[0] < 2e-2


def test_strided_views_and_other_keys_than_queries(launched):
    q, k, v = draw(130, 200)
    packed = torch.randn(2, 130, 3, 2, 64, generator=torch.Generator().manual_seed(1))
    packed[:, :, 2] += 1  # values without a mean would leave little but rounding
    by_channel = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    for given, precision, coverage in (
        ((q, k, v), "int8", 0.6),
        (packed.unbind(2), "bf16", None),
        (packed.unbind(2), "int8", None),
        (by_channel, "bf16", 0.6),
    ):
        out = sla.sparse_linear_attention(*given, None, None, 0.5, precision=precision, coverage=coverage)
        expected = by_torch(*given, (None, None), 0.5, precision, coverage)
        assert relative(out, expected) < TOLERANCE[precision, torch.float32]
    assert len(launched) == 4


# batch 2 of whole query blocks and one ragged sample write the int8 output themselves; the others cannot
@pytest.mark.parametrize(
    "b, length, d, topk, precision",
    [
        (1, 130, 128, 0.5, "int8"),
        (2, 128, 128, 1.0, "bf16"),
        (2, 130, 64, 0.5, "int8"),
    ],
)
def test_from_qkv_with_and_without_its_own_quantization(launched, b, length, d, precision, topk):
    qkv, sums, *rest = raw(length, b, 2, d, torch.bfloat16)
    call = *rest, *projection(d), topk, precision
    o = sla.sla_from_qkv(qkv, sums, *call).view(b * length, -1)
    outs = [o, dequantize_block(*sla.sla_from_qkv(qkv, None, *call, quantize=True))]
    assert len(launched) == 2
    expected = reference.sla_from_qkv(qkv.float(), sums, *rest, *projection(d), topk, None, precision)
    expected = expected.view(b * length, -1)
    errors = [relative(o, expected) for o in outs]
    print(f"raw {precision} B {b} L {length} D {d} top-k {topk}:", " ".join(f"{e:.1e}" for e in errors))
    assert max(errors) < 2e-2
    assert errors[0] < TOLERANCE[precision, torch.bfloat16]


# a bad number reaches the query blocks that keep its key block (k: forced by cumulative score's own blocks)
@pytest.mark.parametrize(
    "which, bad, precision",
    [
        ("q", torch.nan, "int8"),
        ("k", torch.nan, "int8"),
        ("k", torch.inf, "bf16"),
        ("v", torch.inf, "int8"),
        ("v", torch.nan, "bf16"),
    ],
)
def test_a_bad_number_stays_where_it_is_in_the_reference(which, bad, precision):
    q, k, v = draw(300)
    {"q": q, "k": k, "v": v}[which][0, 200, 0, 5] = bad
    out = sla.sparse_linear_attention(q, k, v, None, None, 0.4, precision=precision, coverage=0.4)
    expected = by_torch(q, k, v, (None, None), 0.4, precision, 0.4)
    for x in (out, expected):
        blocks = F.pad(x.isfinite().all(-1), (0, 0, 0, 84), value=True).unflatten(1, (3, 128)).all(2)
        if which == "v":
            index, counts = sla.covering_map(q, k, 0.4)
            kept = torch.tensor([[3 in row[:n] for row, n in zip(*head)] for head in zip(index[0], counts[0])])
            assert kept[0].any()
            assert torch.equal(blocks[0], ~torch.stack([kept[0], torch.zeros(3, dtype=torch.bool)], 1))
        else:
            assert blocks[0].tolist() == [[True, True], [False, True], [True, True]]
    assert relative(out[:, :, 1], expected[:, :, 1]) < TOLERANCE[precision, torch.float32]  # the other head


def test_what_learns_stays_in_torch(launched):
    q, k, v = draw(130)
    q.requires_grad_()
    sla.sparse_linear_attention(q, k, v, *projection(64), 0.5).sum().backward()
    assert q.grad.abs().sum() > 0 and not launched
    with torch.no_grad():
        sla.sparse_linear_attention(q, k, v, *projection(64), 0.5)
    assert len(launched) == 1


# float32 goes in tiles of 64 queries without low bits: one scale block too many at 130 tokens, two at 256
@pytest.mark.parametrize("length", [130, 256])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_int8_output_of_float32(launched, length, precision):
    given = *raw(length, d=128), *projection(128), 0.5, precision
    q8, scale = sla.sla_from_qkv(*given, quantize=True)
    out = sla.sla_from_qkv(*given).view(length, -1)
    expected, expected_scale = reference.quantize_block(out)
    assert len(launched) == 2 and scale.shape == (2, 1)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
    assert (q8.int() - expected.int()).abs().max() <= 1


def test_float32_goes_to_torch_on_a_card(monkeypatch):
    monkeypatch.setattr(paths, "use_triton", lambda *_: True)
    with FakeTensorMode():
        for dtype, device, by_kernels in (
            (torch.float32, "cuda", False),
            (torch.bfloat16, "cuda", True),
            (torch.float32, "cpu", True),
        ):
            chosen = paths.operations(torch.empty(1, 1, 1, 64, dtype=dtype, device=device))
            assert chosen is (fast if by_kernels else reference)


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
    sla.sparse_linear_attention(*draw(65, h=1), weight, bias, 0.5).sum().backward()
    assert torch.allclose(bias.grad, torch.full((64,), 65.0)) and not launched


# positions in sla_from_qkv's operands: a norm weight, the sines, proj_l's bias
@pytest.mark.parametrize("learner", [2, 6, 8])
def test_where_one_operand_of_the_raw_form_learns(launched, learner):
    given = [*raw(65), *projection(64), 0.5]
    given[learner].requires_grad_()
    (sla.sla_from_qkv(*given) * draw(65, h=1)[0]).sum().backward()
    assert given[learner].grad.abs().sum() > 0 and not launched


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

    monkeypatch.setattr(sla_attention, "attention", broken)
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
