"""Sparse attention, its low-bit form and the linear branch in torch, against float64 under the block map's mask."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import oracles
from tests.helpers.attention_inputs import projection
from tests.helpers.live_bytes import LiveBytes
from tests.helpers.qkv import BLOCKS, LENGTHS, qkv
from tests.helpers.tensors import assert_close, gaussian, relative
from turbo_core import sla
from turbo_core.int8 import products
from turbo_core.sla import reference, rows


@pytest.fixture(params=["a row at a time", "pieces", "no int8"], autouse=True)
def way(request, monkeypatch):
    """As a CPU computes, as other devices and what learns do, and as a CPU without products of int8."""
    if request.param == "pieces":
        monkeypatch.setattr(reference, "_has_cache", lambda device: False)
    monkeypatch.setattr(products, "int_mm_pays", lambda device: request.param != "no int8")
    return request.param


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("length", LENGTHS)
def test_topk_1_without_projection_is_dense_attention(length, d):
    q, k, v = qkv(length, b=2, h=3, d=d)
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(sla.sparse_linear_attention(q, k, v, None, None, 1.0), dense, rtol=1e-5, atol=1e-5)
    for sizes in BLOCKS:  # and so is the sparse path itself, which the line above may not have taken
        out = reference.sparse_attention(q, k, v, sla.block_map(q, k, 1.0, *sizes), *sizes)
        torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_q, block_k", BLOCKS)
@pytest.mark.parametrize("length, keys", [(1, 1), (65, 65), (300, 300), (720, 720), (300, 77), (65, 500)])
def test_sparse_attention_is_dense_attention_under_the_mask(length, keys, block_q, block_k):
    q, k, v = qkv(length, keys, b=2, h=2, d=64)
    index = sla.block_map(q, k, 0.35, block_q, block_k)
    expected = oracles.attention(q, k, v, index, None, block_q, block_k)
    out = reference.sparse_attention(q, k, v, index, block_q, block_k)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=2e-6)
    whole = sla.sparse_linear_attention(q, k, v, None, None, 0.35, block_q, block_k)
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=2e-6)


def test_sparse_attention_takes_any_map():
    q, k, v = qkv(200, 300, b=2, h=2, d=128)
    index = torch.randint(5, (2, 2, 2, 1), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    assert index.unique().numel() > 2
    torch.testing.assert_close(
        reference.sparse_attention(q, k, v, index).double(),
        oracles.attention(q, k, v, index),
        rtol=1e-5,
        atol=2e-6,
    )


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_working_in_pieces_changes_nothing(precision, monkeypatch):
    q, k, v = qkv(720, b=2, h=2)
    index = sla.block_map(q, k, 0.4)
    whole = reference.sparse_attention(q, k, v, index, precision=precision)
    monkeypatch.setattr(reference, "GATHERED", 1)
    torch.testing.assert_close(
        reference.sparse_attention(q, k, v, index, precision=precision), whole, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("topk", [0.3, 1.0])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_some_heads_at_a_time_change_nothing(precision, topk, monkeypatch):
    q, k, v = qkv(300, b=2, h=5, d=128)
    q[..., 1, :] *= 9  # heads of different sizes, which share no scale
    v[..., 3, :] *= 9
    args = q, k, v, *projection(128), topk
    whole, seen = sla.sparse_linear_attention(*args, precision=precision), []
    branch = reference.linear_branch
    monkeypatch.setattr(reference, "linear_branch", lambda q, *args: seen.append(q.shape[2]) or branch(q, *args))
    for limit, heads in ((1, [1] * 5), (2 * 300 * 128 * 2, [2, 2, 1])):
        seen.clear()
        monkeypatch.setattr(reference, "SLICE", limit)
        monkeypatch.setattr(reference, "BITE", limit)
        torch.testing.assert_close(sla.sparse_linear_attention(*args, precision=precision), whole, rtol=0, atol=1e-6)
        assert seen == heads


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_number_reaches_only_the_query_blocks_that_chose_its_block(which, bad, precision):
    q, k, v = qkv(640, h=2)
    {"q": q, "k": k, "v": v}[which][0, 200, 0, 5] = bad  # query block 1, key block 3, head 0
    index = sla.block_map(q, k, 0.4)
    if which == "k":
        assert not (index[0, 0] == 3).any()  # a broken block is no one's best
        index[0, 0, 2] = torch.tensor([0, 1, 2, 3])  # unless forced on one
    finite = reference.sparse_attention(q, k, v, index, precision=precision).isfinite().all(-1)
    finite = F.pad(finite, (0, 0, 0, -640 % 128)).unflatten(1, (-1, 128)).all(2)  # [1, query blocks, heads]
    touched = torch.zeros_like(finite)
    if which == "q":
        touched[0, 1, 0] = True
    else:
        touched[0, :, 0] = (index[0, 0] == 3).any(-1)
    assert touched.any() and not touched.all()
    assert finite[~touched].all()
    if bad is torch.nan or which == "v":
        assert not finite[touched].any()


def emulate_low_bit(q, k, v, index, block_q, block_k):
    """SageSLA in float64: int8 q and mean-free k with a scale per block, v per channel and probabilities in e4m3."""

    def int8(x, block):
        out = []
        for part in x.split(block, 1):
            scale = part.abs().amax((1, 3), keepdim=True).clamp_min(1e-8) / 127
            out.append((part / scale).round() * scale)
        return torch.cat(out, 1)

    q, k, v = q.double(), k.double() - k.double().mean(1, keepdim=True), v.double()
    scale = v.abs().amax(1, keepdim=True) / 448
    v = (v / scale).float().to(torch.float8_e4m3fn).double() * scale
    return oracles.attention(int8(q, block_q), int8(k, block_k), v, index, None, block_q, block_k)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_attention_over_rows_of_different_lengths(precision):
    q, k, v = qkv(720, b=2, h=2)
    q[:, 128:256] *= 60
    index, counts = sla.covering_map(q, k, 0.6)
    assert counts.min() + 2 < counts.max()
    v[:, 64 * int(index[0, 0, 0, -1])] += 100  # a block that is read twice would show
    out = reference.sparse_attention(q, k, v, index, precision=precision, counts=counts)
    # what is repeated is a block of the row
    exact = oracles.attention(q, k, v, index) if precision == "bf16" else emulate_low_bit(q, k, v, index, 128, 64)
    assert_close(out, exact, 2e-5 if precision == "bf16" else 0.02)
    whole = sla.sparse_linear_attention(q, k, v, None, None, 0.1, precision=precision, coverage=0.6)
    torch.testing.assert_close(whole, out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_q, block_k", BLOCKS)
def test_low_bit_is_int8_scores_and_fp8_values(block_q, block_k):
    q, k, v = qkv(300, b=2, h=2, d=128)
    q[:, 128:] *= 4  # blocks and channels of different size: scales that were shared would show
    k[:, 64:128] *= 3
    v[..., ::2] *= 30
    index = sla.block_map(q, k, 0.7, block_q, block_k)
    out = reference.sparse_attention(q, k, v, index, block_q, block_k, "int8")
    exact = emulate_low_bit(q, k, v, index, block_q, block_k)
    # the probabilities' own rounding to e4m3, 2^-4 at worst, averages out over the keys
    assert 0.001 < relative(out, exact) < 0.02
    assert_close(out[..., 1::2], exact[..., 1::2], 0.02)


@pytest.mark.parametrize("d", [64, 128])
def test_low_bit_error_on_gaussian_and_on_attention_as_models_have_it(d):
    q, k, v = qkv(720, b=2, h=2, d=d)

    def error(q, k, v):
        index = sla.block_map(q, k, 0.3)
        return relative(
            reference.sparse_attention(q, k, v, index, precision="int8"), reference.sparse_attention(q, k, v, index)
        )

    gaussian = error(q, k, v)
    assert 0.005 < gaussian < 0.06
    # neighbouring tokens alike, keys with a common offset, values with a mean: what RMSNorm and video give
    smooth = [x.cumsum(1) / x.cumsum(1).std() + 0.3 * x for x in (q, k, v)]
    assert error(smooth[0], smooth[1] + 4, smooth[2] + 1) < 0.01


@pytest.mark.parametrize("length, keys, d", [(1, 1, 64), (65, 65, 128), (300, 300, 128), (40, 300, 64)])
def test_linear_branch_folded_and_not_against_float64(length, keys, d):
    q, k, v = qkv(length, keys, b=2, h=3, d=d)
    weight, bias = projection(d)
    expected = oracles.linear_branch(q, k, v, weight, bias)
    for fold in (True, False):
        out = reference.linear_branch(q, k, v, weight, bias, fold)
        assert out.shape == q.shape
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=3e-6)


def test_linear_branch_in_float16_does_not_overflow():
    q, k, v = qkv(8192, dtype=torch.float16)
    v += 1000  # 8192 / 64 * 1000 is above 65504
    out = reference.linear_branch(q, k, v, torch.eye(64), torch.zeros(64))
    torch.testing.assert_close(out, torch.full_like(out, 1000), rtol=0.01, atol=0)


def test_linear_branch_in_bf16_with_float32_projection():
    q, k, v = qkv(720, h=2, d=128, dtype=torch.bfloat16)
    v += 0.5
    weight, bias = projection(128)
    folded, unfolded = (reference.linear_branch(q, k, v, weight, bias, fold) for fold in (True, False))
    assert folded.dtype == torch.bfloat16
    exact = oracles.linear_branch(q, k, v, weight, bias)
    assert_close(folded, exact, 0.005)
    assert_close(unfolded, exact, 0.005)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_nothing_of_size_l_by_l_is_ever_built(precision):
    q, k, v = qkv(4096)
    with Largest() as seen:
        sla.sparse_linear_attention(q, k, v, *projection(64), 0.1, precision=precision)
    assert 4096 * 64 <= seen.numel < 4096 * 4096


@pytest.mark.parametrize("topk", [0.1, 1.0])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_memory_is_linear_in_the_length(precision, topk, monkeypatch):
    monkeypatch.setattr(reference, "GATHERED", 1 << 18)  # pieces in proportion to lengths that a test can wait for
    largest = {}
    for length in (1024, 4096):
        q, k, v = qkv(length)
        with Largest() as seen:
            reference.sparse_attention(q, k, v, sla.block_map(q, k, topk), precision=precision)
        largest[length] = seen.numel
    assert largest[4096] <= 4.01 * largest[1024]


@pytest.mark.parametrize("threads", [1, 8, 40])
def test_rows_computed_together_are_those_computed_alone(threads, monkeypatch, way):
    if way != "a row at a time":
        pytest.skip("rows are grouped on a CPU")
    q, k, v = qkv(720, 700, b=2, h=2)  # six query blocks, of which those that keep the ragged last key block end early
    index = sla.block_map(q, k, 0.4)
    ragged = (index == 10).any(-1)
    assert ragged.any() and not ragged.all()
    expected = oracles.attention(q, k, v, index)
    seen, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *a, **b: seen.append(len(q)) or attend(q, *a, **b))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.testing.assert_close(reference.sparse_attention(q, k, v, index).double(), expected, rtol=1e-5, atol=2e-6)
    assert max(seen) == {1: 1, 8: 2, 40: 1}[threads]  # all six together are of different lengths


def test_a_map_in_any_order_cuts_off_the_padding():
    q, k, v = qkv(128, 300, d=64)
    index = torch.tensor([4, 0, 2], dtype=torch.int32).expand(1, q.shape[2], 1, 3)  # the last block holds 44 keys
    expected = oracles.attention(q, k, v, index)
    torch.testing.assert_close(reference.sparse_attention(q, k, v, index).double(), expected, rtol=1e-5, atol=2e-6)


def test_every_probability_is_rounded_to_fp8_as_torch_rounds():
    p = torch.cat([torch.linspace(0, 1, 4097), torch.logspace(-12, 0, 4095)]).view(2, -1)
    assert torch.equal(rows.fake_fp8(p.clone(), products.Room()), reference._fake_fp8(p, 1 / 448))


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_strides(dtype, precision):
    q, k, v = (x.to(dtype) for x in qkv(300, h=4, d=128))
    index = sla.block_map(q[:, :, ::2], k[:, :, ::2], 0.5)
    out = reference.sparse_attention(q[:, :, ::2], k[:, :, ::2], v[:, :, ::2], index, precision=precision)
    given = q[:, :, ::2], k[:, :, ::2], v[:, :, ::2], index
    exact = emulate_low_bit(*given, 128, 64) if precision == "int8" else oracles.attention(*given)
    assert out.dtype == dtype
    # three key blocks a row: the rounding of probabilities averages out over fewer keys than elsewhere
    assert_close(out, exact, 0.025 if precision == "int8" else 2 * torch.finfo(dtype).eps)


def test_what_is_held_beside_the_blocks_is_one_row(way):
    if way == "pieces":
        pytest.skip("other devices gather up to GATHERED")
    q, k, v = qkv(2048, h=2, d=64)
    index = sla.block_map(q, k, 0.5)
    with torch.no_grad(), LiveBytes() as count:
        reference.sparse_attention(q, k, v, index)
    assert count.peak < 4 * q.nbytes + 2 * (16 * 64 * 64 * 4) + 2**18  # blocks of q, k, v, their result, one row


def test_what_is_gathered_twice_gives_the_same_gradients(monkeypatch):
    """Of a long video the gathered keys and values do not fit: they are gathered again for the gradient."""
    q, k, v = (gaussian(1, 600, 2, 64, seed=seed).requires_grad_(True) for seed in range(3))
    index = sla.block_map(q.detach(), k.detach(), 0.5)
    found = []
    for kept in (1 << 40, 0):
        monkeypatch.setattr(reference, "KEPT", kept)
        out = reference.sparse_attention(q, k, v, index, 128, 64, "bf16")
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))))
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_low_bits_have_the_gradient_of_floats():
    """Rounding has a gradient of zero, and a cast to fp8 and back rounds the gradient to fp8 too, the small ones to
    nothing: both let it through unchanged."""
    q, k, v = (gaussian(1, 600, 2, 64, seed=seed).requires_grad_(True) for seed in range(3))
    index, probe = sla.block_map(q.detach(), k.detach(), 0.5), gaussian(1, 600, 2, 64, seed=3) * 1e-4
    of_floats, of_int8 = (
        torch.autograd.grad((reference.sparse_attention(q, k, v, index, precision=kind) * probe).sum(), (q, k, v))
        for kind in ("bf16", "int8")
    )
    for one, other in zip(of_int8, of_floats):
        assert (one - other).norm() < 0.1 * other.norm()


def test_low_bits_are_the_same_numbers_where_something_learns():
    q, k, v = (gaussian(1, 600, 2, 64, seed=seed) for seed in range(3))
    index = sla.block_map(q, k, 0.5)
    alone = reference.sparse_attention(q, k, v, index, precision="int8")
    learning = reference.sparse_attention(q.requires_grad_(), k, v, index, precision="int8")
    assert (alone - learning).abs().max() < 1e-3 * alone.abs().max()  # another way through the blocks
