"""The public doors of sparse-linear attention: what they compute, from whatever form, and what they refuse."""

import pytest
import torch

from tests.helpers import oracles
from tests.helpers.attention_inputs import projection, raw_form
from tests.helpers.qkv import qkv
from tests.helpers.tensors import assert_close, gaussian
from turbo_core import sla
from turbo_core.errors import TurboError
from turbo_core.int8 import quantize_block
from turbo_core.sla import reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_half_precision_keeps_its_dtype_and_the_result(dtype, precision):
    q, k, v = qkv(300, b=2, h=2, d=128, dtype=dtype)
    weight, bias = projection(128)
    out = sla.sparse_linear_attention(q, k, v, weight, bias, 0.5, precision=precision)
    index = sla.block_map(q, k, 0.5)
    expected = oracles.attention(q, k, v, index) + oracles.linear_branch(q, k, v, weight, bias)
    assert out.dtype == dtype and out.shape == q.shape
    assert_close(out, expected, 0.006 if precision == "bf16" else 0.03)


def test_coverage_1_is_dense_attention():
    q, k, v = qkv(300, h=2)
    for precision in ("bf16", "int8"):
        a, b = (
            sla.sparse_linear_attention(q, k, v, *projection(64), topk, precision=precision, coverage=coverage)
            for topk, coverage in ((0.1, 1.0), (1.0, None))
        )
        assert torch.equal(a, b)


def test_a_large_common_key_offset_changes_little():
    # softmax does not see it; what remains is the rounding of k + 100 to float32
    q, k, v = qkv(300, h=2)
    for precision, tolerance in (("bf16", 2e-4), ("int8", 0.01)):
        plain, moved = (
            sla.sparse_linear_attention(q, x, v, None, None, 0.5, precision=precision) for x in (k, k + 100)
        )
        assert_close(moved, plain, tolerance)


def test_strided_inputs():
    qkv_packed = torch.randn(2, 200, 3, 2, 64, generator=torch.Generator().manual_seed(0))
    weight, bias = projection(64)
    views = qkv_packed.unbind(2)
    for precision in ("bf16", "int8"):
        out, same = (
            sla.sparse_linear_attention(*x, weight, bias, 0.5, precision=precision)
            for x in (views, [v.contiguous() for v in views])
        )
        torch.testing.assert_close(out, same, rtol=1e-6, atol=1e-6)


def test_linear_branch_sees_all_keys_and_the_unshifted_ones():
    q, k, v = qkv(300, h=2)
    weight, bias = projection(64)
    k[:, :, :, 0] += 3  # channel softmax is not invariant to this offset; the sparse branch is
    whole = sla.sparse_linear_attention(q, k, v, weight, bias, 0.2)
    sparse = sla.sparse_linear_attention(q, k, v, None, None, 0.2)
    torch.testing.assert_close(
        (whole - sparse).double(), oracles.linear_branch(q, k, v, weight, bias), rtol=1e-4, atol=1e-5
    )


def raw(b, length, h, d, partials):
    """(qkv, sums, norm_q_weight, norm_k_weight, eps, cos, sin), and q and k normed and turned, in float64."""
    qkv = 3 * gaussian(3, b, length, h, d) + 1
    given, ready = raw_form(*qkv[:2], partials, eps=1e-2)  # an eps that counts
    return (qkv, *given), ready


# ragged length, batch > 1, sums in parts; one token; head_dim 64
@pytest.mark.parametrize("b, length, h, d, partials", [(2, 200, 2, 128, 2), (1, 1, 1, 64, 1), (1, 300, 3, 64, 3)])
@pytest.mark.parametrize("with_sums", [True, False])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_from_qkv_is_norm_rope_and_attention(b, length, h, d, partials, with_sums, precision):
    (qkv, sums, *norm_and_turn), (q, k) = raw(b, length, h, d, partials)
    expected = sla.sparse_linear_attention(q.float(), k.float(), qkv[2], *projection(d), 0.4, precision=precision)
    given = qkv, sums if with_sums else None, *norm_and_turn, *projection(d), 0.4, precision
    out = sla.sla_from_qkv(*given)
    assert_close(out, expected, 1e-5 if precision == "bf16" else 2e-3)  # values beside a rounding edge
    q8, scale = sla.sla_from_qkv(*given, quantize=True)
    assert all(map(torch.equal, (q8, scale), quantize_block(out.view(b * length, h * d))))


def test_from_qkv_in_slices_rounds_once_and_leaves_its_input(monkeypatch):
    (qkv, sums, norm_q, _, eps, cos, sin), _ = raw(1, 300, 2, 64, 1)
    x = qkv[0].bfloat16()
    before = x.clone()
    whole = reference.normed(x, sums[0], norm_q, eps, cos, sin)
    exact = reference.normed(x.float(), sums[0], norm_q, eps, cos, sin)
    assert torch.equal(whole, exact.bfloat16()) and torch.equal(x, before)
    monkeypatch.setattr(reference, "BITE", 2 * 64 * 77)
    assert torch.equal(reference.normed(x, sums[0], norm_q, eps, cos, sin), whole)
    for given in ((sums[0], norm_q, eps, None, None), (None, None, eps, cos, sin)):  # each step by itself
        assert not torch.equal(reference.normed(x, *given), whole)


@pytest.mark.parametrize(
    "at, shape, name",
    [
        (0, (2, 1, 64, 1, 64), "qkv"),
        (1, (2, 1, 63), "sums"),
        (2, (128,), "norm_q_weight"),
        (3, (63,), "norm_k_weight"),
        (5, (64, 64), "cos"),
        (6, (63, 32), "sin"),
    ],
)
def test_from_qkv_names_what_does_not_fit(at, shape, name):
    given = list(raw(1, 64, 1, 64, 1)[0])
    given[at] = torch.zeros(shape)
    with pytest.raises(TurboError, match=rf"{name}.*{shape[-1]}\]"):
        sla.sla_from_qkv(*given, *projection(64), 0.5)


@pytest.mark.parametrize("topk", [-0.1, 1.1, torch.nan, 10])
def test_bad_topk(topk):
    q, k, v = qkv(64)
    for call in (lambda: sla.block_map(q, k, topk), lambda: sla.sparse_linear_attention(q, k, v, None, None, topk)):
        with pytest.raises(TurboError, match=f"topk.*{topk}"):
            call()


@pytest.mark.parametrize("coverage", [-0.1, 1.1, torch.nan])
def test_bad_coverage(coverage):
    q, k, v = qkv(64)
    with pytest.raises(TurboError, match=f"coverage.*{coverage}"):
        sla.sparse_linear_attention(q, k, v, None, None, 0.1, coverage=coverage)
    with pytest.raises(TurboError, match=f"coverage.*{coverage}"):
        sla.covering_map(q, k, coverage)


@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 64, 2, 64), (1, 64, 2, 64), (1, 63, 2, 64)],
        [(1, 64, 2, 64), (1, 64, 1, 64), (1, 64, 1, 64)],
        [(1, 64, 2, 64), (2, 64, 2, 64), (2, 64, 2, 64)],
        [(1, 64, 2, 64), (1, 64, 2, 128), (1, 64, 2, 128)],
        [(64, 2, 64)] * 3,
    ],
)
def test_shapes_that_do_not_fit_are_all_named(shapes):
    with pytest.raises(TurboError) as error:
        sla.sparse_linear_attention(*(torch.zeros(s) for s in shapes), None, None, 0.5)
    assert all(str(list(s)) in str(error.value) for s in shapes)


def test_other_head_dims_and_precisions_are_refused():
    with pytest.raises(TurboError, match="head_dim 64 and 128, got 96"):
        sla.sparse_linear_attention(*qkv(64, d=96), None, None, 0.5)
    with pytest.raises(TurboError, match="fp4"):
        sla.sparse_linear_attention(*qkv(64), None, None, 0.5, precision="fp4")


@pytest.mark.parametrize("dtypes", [["float64"] * 3, ["int64"] * 3, ["float32", "bfloat16", "float32"]])
def test_other_and_mixed_dtypes_are_refused(dtypes):
    given = [x.to(getattr(torch, dtype)) for x, dtype in zip(qkv(64), dtypes)]
    with pytest.raises(TurboError, match=f"got {', '.join(dtypes)}"):
        sla.sparse_linear_attention(*given, None, None, 0.5)


def test_no_tokens_are_refused():
    with pytest.raises(TurboError, match="at least one token"):
        sla.sparse_linear_attention(*(torch.zeros(1, 0, 2, 64) for _ in range(3)), None, None, 0.5)


def test_a_projection_of_another_size_is_refused():
    with pytest.raises(TurboError, match=r"\[128, 128\]"):
        sla.sparse_linear_attention(*qkv(64, d=64), *projection(128), 0.5)
    with pytest.raises(TurboError, match=r"bias \[64\], got None"):
        sla.sparse_linear_attention(*qkv(64, d=64), projection(64)[0], None, 0.5)
