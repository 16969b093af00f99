"""The attention kernel against float64 and its torch reference."""

import pytest
import torch
import torch.nn.functional as F
from turbo_core.kernels.sla_attention import attention, can_quantize

from tests.helpers import oracles
from tests.helpers.attention_inputs import draw, int8_blocks, linear_sums, low_bit, projection, raw_form, some_map
from tests.helpers.oracles import linear_branch
from tests.helpers.tensors import assert_close
from turbo_core.int8 import dequantize_block
from turbo_core.int8.reference import quantize_block
from turbo_core.sla import reference

# (L, B, H, D, raw): one token; less than a block of keys; two query blocks, the second of 2 rows, and a third key block
# of 2, more than a batch; ragged in both; several query blocks
SHAPES = [(1, 1, 1, 64, True), (63, 1, 2, 128, False), (130, 2, 1, 128, True), (200, 1, 2, 64, False)]
SHAPES += [(720, 1, 1, 128, True)]
# the largest relative error that the dtype's own rounding of the result and of the probabilities explains
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def in_heads(x):
    return x.transpose(1, 2)


def form_of(q, raw):
    """(what the kernel is to do to q on load, the float64 q that comes of it)."""
    if not raw:
        return {}, q
    (sums, weight, _, eps, cos, sin), (ready, _) = raw_form(q, q + 3)  # the sums of k are others
    return {"sums": sums, "q_weight": weight, "eps": eps, "cos": cos, "sin": sin}, ready


# ---- SLA: the input's own precision


@pytest.mark.parametrize("length, b, h, d, raw", SHAPES)
def test_both_branches_against_float64(length, b, h, d, raw):
    q, k, v = draw(length, b=b, h=h, d=d)
    index, proj = some_map(b, h, length, length), projection(d)
    form, ready = form_of(q, raw)
    out = attention(q, in_heads(k), in_heads(v), index, **linear_sums(k, v, *proj), **form)
    exact = oracles.attention(ready, k, v, index) + linear_branch(ready, k, v, *proj)
    assert_close(out, exact, ROUNDING[torch.float32])
    by_torch = reference.sparse_attention(ready.float(), k, v, index) + reference.linear_branch(ready, k, v, *proj)
    torch.testing.assert_close(out, by_torch.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("raw", [False, True])
def test_half_precision_is_its_own_rounding_from_float64(dtype, raw):
    q, k, v = draw(200, h=2, d=128, dtype=dtype)
    k = k - k.mean(1, keepdim=True)  # q k in the range of what is rounded: p has no digits for scores in the hundreds
    index, proj = some_map(1, 2, 200, 200), projection(128)
    form, ready = form_of(q, raw)
    out = attention(q, in_heads(k), in_heads(v), index, **linear_sums(k, v, *proj), **form)
    assert out.dtype == dtype
    # scores come of q as it is rounded, the linear branch of q as it is
    exact = oracles.attention(ready.to(dtype), k, v, index) + linear_branch(ready, k, v, *proj)
    assert_close(out, exact, ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length, keys, d", [(130, 130, 64), (65, 200, 128), (200, 64, 64)])  # ragged; other keys
def test_without_a_map_it_is_dense_attention(length, keys, d, dtype):
    q, k, v = draw(length, keys, b=2, h=1, d=d, dtype=dtype)
    out = attention(q, in_heads(k), in_heads(v))
    dense = F.scaled_dot_product_attention(*(in_heads(x).double() for x in (q, k, v))).transpose(1, 2)
    assert_close(out, dense, ROUNDING[dtype])
    every = torch.arange(-(-keys // 64), dtype=torch.int32).expand(2, 1, -(-length // 128), -1).contiguous()
    assert torch.equal(attention(q, in_heads(k), in_heads(v), every), out)


def test_a_large_common_key_offset_changes_little():
    q, k, v = draw(130, d=64)
    plain, moved = (attention(q, in_heads(x), in_heads(v)) for x in (k, k + 100))
    assert_close(moved, plain, 2e-4)  # the rounding of k + 100 itself


def test_what_is_kept_behind_the_count_is_not_looked_at():
    q, k, v = draw(300, h=2, d=64)
    counts = torch.tensor([[[1, 2, 4], [3, 5, 1]]], dtype=torch.int32)
    index = torch.full((1, 2, 3, 5), 4, dtype=torch.int32)
    for row in [(h, i) for h in range(2) for i in range(3)]:
        kept = torch.arange(5, dtype=torch.int32)[-counts[0][row] :]
        index[0][row] = F.pad(kept, (0, 5 - len(kept)), value=4)
    index[0, 0, 0] = 2  # and a row without the ragged block
    out = attention(q, in_heads(k), in_heads(v), index, counts=counts)
    assert_close(out, oracles.attention(q, k, v, index, counts), ROUNDING[torch.float32])


# ---- SageSLA: int8 scores, fp8 or fp16 values


@pytest.mark.parametrize("length, b, h, d, raw", SHAPES)
@pytest.mark.parametrize("fp8", [True, False])
def test_low_bit_is_int8_scores_and_rounded_values(length, b, h, d, fp8, raw):
    q, k, v = draw(length, b=b, h=h, d=d)
    index, proj = some_map(b, h, length, length), projection(d)
    form, ready = form_of(q, raw)
    given, (k_int8, v_rounded) = low_bit(k, v, fp8)
    out = attention(q, index=index, **given, **form)
    exact = oracles.attention(int8_blocks(ready), k_int8, v_rounded, index)
    # the probabilities are rounded to three binary digits, or to ten
    assert_close(out, exact, 0.02 if fp8 else 4e-4)
    assert_close(out, reference.sparse_attention(ready.float(), k, v, index, precision="int8"), 0.02)
    both = attention(q, index=index, **given, **form, **linear_sums(k, v, *proj))
    # the linear branch is rounded to 16 bits, with ten binary digits
    assert_close(both.double() - out.double(), linear_branch(ready, k, v, *proj), 1e-3)


@pytest.mark.parametrize("d", [64, 128])
def test_low_bit_is_near_exact_attention_where_attention_is_as_models_have_it(d):
    q, k, v = draw(720, h=1, d=d, seed=3)
    q = q.cumsum(1) / q.cumsum(1).std() + 0.3 * q
    given, _ = low_bit(k, v + 1, True)
    index = some_map(1, 1, 720, 720, kept=5)
    assert_close(attention(q, index=index, **given), oracles.attention(q, k, v + 1, index), 0.02)


@pytest.mark.parametrize("fp8", [True, False])
def test_low_bit_without_a_map(fp8):
    q, k, v = draw(130, 200, b=2, h=2, d=128, dtype=torch.bfloat16)
    given, (k_int8, v_rounded) = low_bit(k, v, fp8)
    out = attention(q, **given)
    assert out.dtype == torch.bfloat16
    assert_close(out, oracles.attention(int8_blocks(q), k_int8, v_rounded), 0.02 if fp8 else 4e-3)


def test_integers_of_the_largest_size_do_not_overflow():
    # every product 127 * 127: sums of 128 of them, in fp8's path by a cast, in fp16's by bits
    q = torch.ones(1, 128, 1, 128)
    k_scale = torch.full((1, 1, 1), 1e-4)
    k = torch.full((1, 1, 64, 128), 127, dtype=torch.int8)
    k[:, :, ::2] = -127
    v = torch.randn(1, 1, 64, 128, generator=torch.Generator().manual_seed(0))
    v_scale = torch.ones(1, 1, 128)
    exact = oracles.attention(q, k.transpose(1, 2) * 1e-4, v.to(torch.float8_e4m3fn).float().transpose(1, 2))
    t = v.transpose(2, 3).contiguous().to(torch.float8_e4m3fn)
    # two probabilities in all, and so two errors: e4m3's largest, 1/16
    assert_close(attention(q, k, t, k_scale=k_scale, v_scale=v_scale), exact, 0.0625)
    exact = oracles.attention(q, k.transpose(1, 2) * 1e-4, v.transpose(1, 2))
    assert_close(attention(q, k, v.half(), k_scale=k_scale, v_scale=v_scale), exact, 1e-3)


# ---- the linear branch alone


def test_the_linear_branch_sees_sums_over_many_keys():
    # sums over 75,600 keys of values of a thousand leave float16
    q, k, v = draw(64, d=128)
    given, _ = low_bit(k, v, False)
    many = linear_sums(k, v * 1000, *projection(128))
    many["kv_proj"], many["k_sum"] = many["kv_proj"] * 1200, many["k_sum"] * 1200
    branch = attention(q, **given, **many).double() - attention(q, **given).double()
    cq = q.double().transpose(1, 2).softmax(-1)
    divisor = 1e-5 + cq @ many["k_sum"].double()[..., None]
    exact = (cq @ many["kv_proj"].double() / divisor + many["proj_bias"]).transpose(1, 2)
    assert_close(branch, exact, 1e-3)


# ---- int8 output


@pytest.mark.parametrize("length, b", [(200, 1), (128, 2), (1, 1)])  # ragged; more than a batch; one row
def test_int8_output_is_the_block_format(length, b):
    q, k, v = draw(length, b=b, h=2, d=128, dtype=torch.bfloat16)
    given, _ = low_bit(k, v, True)
    args = {"index": some_map(b, 2, length, length), **given, **linear_sums(k, v, *projection(128))}
    q_out, scale = attention(q, quantize=True, **args)
    assert q_out.shape == (b * length, 256) and q_out.dtype == torch.int8
    out = attention(q.float(), **args).view(b * length, 256)
    expected, expected_scale = quantize_block(out)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
    away = (q_out.int() - expected.int()).abs()
    assert away.max() <= 1 and away.float().mean() < 1e-3  # float32 sums in another order
    assert_close(dequantize_block(q_out, scale), out, 0.02)


def test_where_int8_output_is_possible():
    shapes = [(1, 200, 2, 128), (2, 256, 2, 128), (2, 200, 2, 128), (1, 128, 2, 64)]
    assert [can_quantize(torch.empty(s, dtype=torch.bfloat16)) for s in shapes] == [True, True, False, False]
    # float32 is multiplied in tiles of 64 queries, half a scale block: it once wrote past the end of the scales
    q, k, v = draw(256, h=2, d=128)
    assert not can_quantize(q) and can_quantize(q, low_bit=True)
    with pytest.raises(ValueError, match="16 bits"):
        attention(q, in_heads(k), in_heads(v), quantize=True)


def test_a_projection_of_zeros_adds_its_bias_to_large_values():
    q, k, v = draw(66, d=64)
    v = 2e4 * v
    zeros = torch.zeros(64, 64), torch.ones(64)
    out = attention(q, in_heads(k), in_heads(v), **linear_sums(k, v, *zeros))
    torch.testing.assert_close(out, attention(q, in_heads(k), in_heads(v)) + 1, rtol=1e-4, atol=1e-2)


# ---- layouts, repetition, bad numbers


@pytest.mark.parametrize("form", ["bf16", "int8"])
def test_strides_and_repetition_change_no_bit(form):
    packed = torch.stack(draw(66, b=2, h=2, d=64), 2)  # [B, L, 3, H, D], as one projection leaves it
    index = some_map(2, 2, 66, 66)

    def attend(q, k, v):
        given = low_bit(k, v, True)[0] if form == "int8" else {"k": in_heads(k), "v": in_heads(v)}
        return attention(q, index=index, **given, **linear_sums(k, v, *projection(64)))

    views = packed.unbind(2)
    out = attend(*views)
    assert torch.equal(out, attend(*views)) and torch.equal(out, attend(*(x.contiguous() for x in views)))
    planes = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in views]
    assert torch.equal(out, attend(*planes))


@pytest.mark.parametrize("form", ["bf16", "int8"])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_number_stays_where_it_is_seen(which, bad, form):
    q, k, v = draw(300, h=2, d=64)
    index = some_map(1, 2, 300, 300, kept=2)
    index[0, 0] = torch.tensor([[0, 1], [1, 2], [2, 4]])
    given = low_bit(k, v, True)[0] if form == "int8" else {"k": in_heads(k).clone(), "v": in_heads(v).clone()}
    row = 70  # of key block 1, which query blocks 0 and 1 of head 0 keep
    if which == "q":
        q[0, row, 0, 3] = bad
    elif form == "bf16":
        given[which][0, 0, row, 3] = bad
    elif which == "k":
        given["k_scale"][0, 0, 1] = bad
    else:
        given["v"].view(torch.uint8)[0, 0, 3, row] = 0x7F  # the one bit pattern of e4m3 that is not a number
    out = attention(q, index=index, **given)
    finite = F.pad(out.isfinite().all(-1), (0, 0, 0, 84), value=True).unflatten(1, (3, 128)).all(2)[0].t()
    touched = torch.tensor([[True, which != "q", False], [False] * 3])
    assert finite[~touched].all()
    if not (which == "k" and bad == torch.inf and form == "bf16"):  # a score of -inf weighs nothing, as in softmax
        assert not finite[touched].any()
    if form == "bf16" and which == "q":  # nor does it reach its neighbours
        assert out[0, :row].isfinite().all() and out[0, row + 1 :].isfinite().all()


def test_rows_past_the_end_do_not_make_the_scale_of_int8_output():
    # a query that is not there gives the mean of all values, which here is larger than any that is
    q, k, v = torch.zeros(1, 3, 1, 128), torch.zeros(1, 64, 1, 128), torch.full((1, 64, 1, 128), 100.0)
    k[:, 0], q[..., 0], v[:, 0] = 0, 1, 0.01
    k[:, 0, :, 0] = 400
    q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    q_out, scale = attention(q, in_heads(k), in_heads(v), quantize=True)
    assert scale.item() == pytest.approx(v[0, 0, 0, 0].item() / 128, rel=1e-3) and (q_out == 127).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(1, 2, 130, 32)}, "k must be"),
        ({"v": torch.zeros(1, 2, 129, 64)}, "v must be"),
        ({"v": torch.zeros(1, 2, 130, 64, dtype=torch.float16)}, "v must be"),
        ({"k_scale": torch.zeros(1, 2, 3)}, "k_scale does not belong"),
        ({"index": torch.zeros(1, 2, 2, 1, dtype=torch.int64)}, "index must be"),
        ({"kv_proj": torch.zeros(1, 2, 64, 64)}, "k_sum must be"),
        ({"sums": torch.zeros(2, 1, 130)}, "q_weight must be"),
        ({"sums": torch.zeros(2, 130), "q_weight": torch.zeros(128)}, "sums must be"),
        ({"sums": torch.zeros(2, 1, 129), "q_weight": torch.zeros(128)}, "sums must be"),
        ({"cos": torch.zeros(130, 32)}, "come together"),
        ({"quantize": True}, "int8 output"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    q, k, v = draw(130, h=2, d=64)
    with pytest.raises(ValueError, match=message):
        attention(q, **{"k": in_heads(k), "v": in_heads(v), **change})
