"""Operands of the int8 products and what comes of them in float64."""

import torch
import torch.nn.functional as F

from turbo_core import int8

FORMATS = ("block", "row")
SHAPES = [  # M, N, K
    (1, 64, 128),  # one row, half a tile of columns
    (5, 200, 200),  # ragged N and K, in the second block of each
    (120, 256, 384),  # one block of rows, ragged as 32760 tokens end
    (248, 200, 384),  # two of them, ragged N
]


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantized(fmt, rows, k, seed):
    """(int8 [rows, k], scale), quantized in torch, with scales that differ: mixed up, they would be seen."""
    x = gaussian(rows, k, seed=seed)
    x[rows // 2 :] *= 4
    x[:, k // 2 :] *= 3
    scale = x.abs().amax(1, keepdim=True) / 127
    if fmt == "row":
        return (x / scale).round().to(torch.int8), scale
    return int8._quantize_block(x)


def exact(x, w, bias=None, gelu=False):
    """The product in float64."""
    y = int8.dequantize(*x, torch.float32).double() @ int8.dequantize(*w, torch.float32).double().t()
    y = y if bias is None else y + bias.double()
    return F.gelu(y, approximate="tanh") if gelu else y


def gated(y, residual, gate):
    if gate is not None:
        y = y * gate.double().repeat_interleave(len(y) // len(gate), 0)
    return residual.double() + y


def exact_stats(y):
    """float64 [ceil(N/128), M, 2]: mean and sum of squared deviations of spans of 128 columns."""
    spans = y.double().split(128, 1)
    return torch.stack([torch.stack([s.mean(1), ((s - s.mean(1, True)) ** 2).sum(1)], -1) for s in spans])


def exact_squares(y):
    return torch.stack([span.double().square().sum(1) for span in y.split(128, 1)])


def assert_near(y, expected, tolerance):
    """Largest difference relative to the largest value; a NaN fails."""
    assert y.shape == expected.shape
    error = (y.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
    assert error.item() <= tolerance, error.item()
