"""Cross-attention through the kernel against float64."""

import pytest
import torch
from turbo_core.kernels.cross_attention import cross_attention, square_sums

from tests.helpers import oracles
from tests.helpers.tensors import assert_close
from turbo_core.int8 import dequantize_block

EPS = 1e-6
# (L, keys, B, H, D): one token and one key; a batch, ragged in both; whole blocks; heads of 64, more keys than queries
SHAPES = [(1, 1, 1, 1, 128), (130, 77, 2, 2, 128), (128, 128, 2, 1, 128), (63, 200, 1, 3, 64)]


def draw(length, keys, b, h, d, dtype=torch.float32, seed=0):
    """q before its norm, with tokens and channels of different size; k and v of a text; the norm's weight."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, n, h, d, generator=generator) for n in (length, keys, keys))
    q = q * torch.logspace(-1, 1, length)[:, None, None]
    q[..., 7] *= 10
    weight = 1 + 0.3 * torch.randn(h * d, generator=generator)
    return *(x.to(dtype) for x in (q, k + 0.5, v + 0.2)), weight


def exact(q, k, v, weight):
    if weight is not None:
        q = oracles.rms_norm(q.flatten(2), weight, EPS).view(q.shape)
    return oracles.attention(q, k, v)


@pytest.mark.parametrize("form", ["normed", "sums", "no sums"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, form):
    q, k, v, weight = draw(*shape)
    given = {} if form == "normed" else {"norm_weight": weight}
    if form == "sums":
        halves = q.flatten(2).flatten(0, 1).chunk(2, 1)
        given["sums"] = torch.stack([half.square().sum(1) for half in halves])
    assert_close(cross_attention(q, k, v, eps=EPS, **given), exact(q, k, v, given.get("norm_weight")), 1e-5)


@pytest.mark.parametrize("dtype, step", [(torch.bfloat16, 6e-3), (torch.float16, 8e-4)], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:])
def test_half_precision_and_repetition(shape, dtype, step):
    q, k, v, weight = draw(*shape, dtype=dtype)
    out = cross_attention(q, k, v, norm_weight=weight)
    assert out.dtype == dtype and out.is_contiguous()
    assert_close(out, exact(q, k, v, weight), step)
    assert torch.equal(cross_attention(q, k, v, norm_weight=weight), out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(130, 77, 1, 2, 128), SHAPES[2]])  # ragged; a batch of whole blocks
def test_int8_output(shape, dtype):
    q, k, v, weight = draw(*shape, dtype=dtype)
    given = q, k, v, None, weight
    q8, scale = cross_attention(*given, quantize=True)
    again = cross_attention(*given, quantize=True)
    assert q8.dtype == torch.int8 and torch.equal(again[0], q8) and torch.equal(again[1], scale)
    assert_close(dequantize_block(q8, scale).view(q.shape), exact(q, k, v, weight), 0.02)


def test_strided_queries():
    q, k, v, weight = draw(65, 70, 2, 2, 64)
    wide = torch.cat([q, q], 1)[:, :65]  # samples further apart than they are long
    assert torch.equal(cross_attention(wide, k, v, norm_weight=weight), cross_attention(q, k, v, norm_weight=weight))
    apart = torch.stack([q, q], 3)[:, :, :, 0]  # heads that do not lie side by side
    with pytest.raises(ValueError, match="side by side"):
        square_sums(apart)


def test_a_bad_number_stays_in_its_row():
    q, k, v, weight = draw(130, 70, 1, 2, 64)
    q[0, 5, 1, 3] = torch.nan
    finite = cross_attention(q, k, v, norm_weight=weight).isfinite().all(-1)[0]
    assert not finite[5].any() and finite[:5].all() and finite[6:].all()  # the norm goes over both heads


def test_sums_without_a_weight_are_refused():
    q, k, v, _ = draw(5, 5, 1, 1, 64)
    with pytest.raises(ValueError, match="without"):
        cross_attention(q, k, v, sums=torch.zeros(1, 5))
