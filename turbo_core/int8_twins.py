"""Torch twins of kernels/int8_mm.py: the reference, the oracle of its tests, and the path of a machine without Triton.

Names, arguments and results are those of turbo_core.int8_mm. Rows are computed a slice at a time, so that the int32
and float32 forms of the product stay small beside x and y.
"""

import torch
import torch.nn.functional as F

from . import int8
from .int8 import BLOCK


def _products(x_q, x_scale, w_q, w_scale, bias, dtype):
    """Yield (slice of rows, their float32 product with bias); slices are whole blocks of rows."""
    # where K <= 128, the scale of a matrix of one row belongs to both formats
    by_rows = int8.is_row_scale(x_q, x_scale) and int8.is_row_scale(w_q, w_scale)
    multiply, weight = int8.multiplier(w_q, w_scale, by_rows, dtype)
    step = int8.slice_rows(w_q)
    for start in range(0, x_q.shape[0], step):
        rows = slice(start, start + step)
        scale = x_scale[rows] if by_rows else x_scale[start // BLOCK : (start + step) // BLOCK]
        part = multiply(x_q[rows], scale, *weight).float()
        yield rows, part if bias is None else part.add_(bias)


def _gelu(x):
    return F.gelu(x, approximate="tanh")


def span_stats(y):
    """[M, N] -> float32 [ceil(N/128), M, 2]: mean and sum of squared deviations of each row's spans of 128 columns."""
    stats = []
    for span in y.split(BLOCK, 1):
        span = span.float()
        mean = span.mean(1)
        stats.append(torch.stack([mean, (span - mean[:, None]).square().sum(1)], -1))
    return torch.stack(stats)


def span_squares(y):
    """[M, N] -> float32 [ceil(N/128), M]: sum of squares of each row's spans of 128 columns."""
    return torch.stack([span.float().square().sum(1) for span in y.split(BLOCK, 1)])


def int8_mm(x_q, x_scale, w_q, w_scale, bias=None, out_dtype=torch.bfloat16, gelu=False):
    y = x_scale.new_empty(x_q.shape[0], w_q.shape[0], dtype=out_dtype)
    for rows, part in _products(x_q, x_scale, w_q, w_scale, bias, out_dtype):
        y[rows] = _gelu(part) if gelu else part
    return y


def int8_mm_quantize(x_q, x_scale, w_q, w_scale, bias=None, gelu=True):
    m, n = x_q.shape[0], w_q.shape[0]
    y_q, y_scale = x_q.new_empty(m, n), x_scale.new_empty(int8.block_scale_shape(m, n))
    for rows, part in _products(x_q, x_scale, w_q, w_scale, bias, torch.bfloat16):
        q, scale = int8.quantize_block(_gelu(part) if gelu else part)
        first = rows.start // BLOCK
        y_q[rows], y_scale[first : first + len(scale)] = q, scale
    return y_q, y_scale


def int8_mm_residual(x_q, x_scale, w_q, w_scale, bias, residual, gate=None, stats=True):
    m, n = residual.shape
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    sums = x_scale.new_empty(-(-n // BLOCK), m, 2) if stats else None
    for rows, part in _products(x_q, x_scale, w_q, w_scale, bias, residual.dtype):
        if gate is not None:
            group = torch.arange(rows.start, rows.start + len(part), device=part.device) // (m // gate.shape[0])
            part.mul_(gate[group])
        y[rows] = part.add_(residual[rows])
        if stats:
            sums[:, rows] = span_stats(y[rows])
    return y, sums


def int8_mm_qkv(x_q, x_scale, weights, scales, biases=None, out_dtype=torch.bfloat16):
    m, n = x_q.shape[0], weights[0].shape[0]
    y = x_scale.new_empty(3, m, n, dtype=out_dtype)
    sums = x_scale.new_empty(2, -(-n // BLOCK), m)
    for i, (w_q, w_scale, bias) in enumerate(zip(weights, scales, biases or (None,) * 3)):
        for rows, part in _products(x_q, x_scale, w_q, w_scale, bias, out_dtype):
            y[i, rows] = part
            if i < 2:
                sums[i, :, rows] = span_squares(y[i, rows])
    return y, sums
