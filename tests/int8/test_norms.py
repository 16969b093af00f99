"""Norms in torch: LayerNorm straight to int8, row statistics, RMSNorm with one rounding."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import oracles
from tests.helpers.tensors import gaussian
from turbo_core.int8 import dequantize, reference

EPS = 1e-6


def operands():
    # ragged rows and columns; groups of 100 rows, which blocks of 128 straddle
    x = gaussian(300, 200, dtype=torch.bfloat16) + gaussian(300, 1, seed=1, dtype=torch.bfloat16)
    vectors = {"weight": gaussian(200, seed=2), "bias": gaussian(200, seed=3)}
    return x, vectors | {"shift": gaussian(3, 200, seed=4), "scale": gaussian(3, 200, seed=5)}


@pytest.mark.parametrize("slice_size", [1, reference.BITE], ids=["slices of a block", "one slice"])
@pytest.mark.parametrize("given", [False, True], ids=["own statistics", "given statistics"])
@pytest.mark.parametrize("rows", [False, True], ids=["block", "row"])
def test_layer_norm_quantize(rows, given, slice_size, monkeypatch):
    monkeypatch.setattr(reference, "BITE", slice_size)
    x, vectors = operands()
    y = oracles.layer_norm(x, EPS, **vectors)
    stats = reference.row_stats(x) if given else None
    q, scale = reference.layer_norm_quantize(x, EPS, **vectors, stats=stats, rows=rows)
    assert scale.shape == ((300, 1) if rows else (3, 2)) and q.dtype == torch.int8
    if rows:
        step = y.abs().amax(1, keepdim=True) / 127
    else:
        padded = F.pad(y, (0, 56, 0, 84)).abs()
        step = padded.unflatten(0, (3, 128)).unflatten(2, (2, 128)).amax((1, 3)) / 128
    torch.testing.assert_close(scale.double(), step, rtol=1e-5, atol=0)
    if not rows:
        step = step.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
    off = (dequantize(q, scale) - y).abs() / step
    assert off.max() <= (0.501 if rows else 1.001)  # +128 becomes 127
    assert (off > 0.501).sum() <= scale.numel()


def test_row_stats_of_ragged_spans():
    x = gaussian(130, 300) * 3 + 100
    stats = reference.row_stats(x)
    assert stats.shape == (3, 130, 2)
    for span, part in zip(stats.double(), x.double().split(128, 1)):
        torch.testing.assert_close(span[:, 0], part.mean(1), rtol=1e-6, atol=0)
        squares = (part - part.mean(1, keepdim=True)).square().sum(1)
        torch.testing.assert_close(span[:, 1], squares, rtol=1e-4, atol=0)


def test_rms_norm_rounds_once():
    x, vectors = operands()
    y = reference.rms_norm(x, vectors["weight"], EPS)
    expected = F.rms_norm(x.float(), (200,), vectors["weight"], EPS).to(torch.bfloat16)
    assert torch.equal(y, expected)


def test_no_rows():
    x = torch.zeros(0, 256)
    assert [t.shape for t in reference.layer_norm_quantize(x, EPS)] == [(0, 256), (0, 2)]
    assert reference.row_stats(x).shape == (2, 0, 2) and reference.rms_norm(x, x.new_ones(256), EPS).shape == (0, 256)


def test_statistics_have_gradients():
    x = gaussian(5, 200).requires_grad_()
    reference.row_stats(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_no_columns():
    assert reference.row_stats(torch.zeros(3, 0)).shape == (0, 3, 2)
    assert reference.rms_norm(torch.zeros(3, 0), torch.zeros(0), EPS).shape == (3, 0)
