"""Partial statistics of rows, (mean, sum of squared deviations) of each span of 128 columns, and their merging."""

import torch
import triton
import triton.language as tl

from . import launch
from .quantize import matrix_shape
from .rows import load_columns

SPAN = 128  # columns of a partial statistic, rows and columns of a block


@triton.jit(do_not_specialize=["M"])
def row_stats_kernel(
    x_ptr,  # [M, K] any strides
    stats_ptr,  # [ceil(K/SPAN), M, 2] float32
    M,
    K,
    stride_m,
    stride_k,
    SPAN: tl.constexpr,
):
    # one program owns SPAN rows of one span of columns; the spans of the same rows run next to each other
    spans = tl.cdiv(K, SPAN)
    span = tl.program_id(0) % spans
    rows = tl.program_id(0) // spans * SPAN + tl.arange(0, SPAN)
    cols = span * SPAN + tl.arange(0, SPAN)
    x = load_columns(x_ptr + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * stride_m, cols, stride_k, K)
    count = tl.minimum(K - span * SPAN, SPAN).to(tl.float32)
    mean = tl.sum(x, 1) / count
    deviation = tl.where((cols < K)[None, :], x - mean[:, None], 0.0)
    place = (span.to(tl.int64) * M + rows) * 2
    tl.store(
        stats_ptr + place[:, None] + tl.arange(0, 2)[None, :],
        tl.join(mean, tl.sum(deviation * deviation, 1)),
        mask=(rows < M)[:, None],
    )


@triton.jit
def inverse_deviation(squares, K, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(squares / K + eps))


@triton.jit(do_not_specialize=["M"])
def merge_stats_kernel(
    stats_ptr,  # [ceil(K/SPAN), M, 2] float32: mean, sum of squared deviations
    merged_ptr,  # [M, 2] float32: mean, 1 / deviation
    M,
    K,
    eps,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,  # a power of two
    ROWS: tl.constexpr,
):
    # one program owns ROWS rows and all their spans
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    spans = tl.arange(0, SPANS)
    place = (spans.to(tl.int64)[:, None] * M + rows[None, :]) * 2
    inside = (spans * SPAN < K)[:, None] & (rows < M)[None, :]
    stats = tl.load(stats_ptr + place[:, :, None] + tl.arange(0, 2)[None, None, :], mask=inside[:, :, None], other=0.0)
    means, squares = tl.split(stats)
    count = tl.maximum(tl.minimum(K - spans * SPAN, SPAN), 0).to(tl.float32)[:, None]
    mean = tl.sum(means * count, 0) / K
    away = means - mean[None, :]
    total = tl.sum(squares + count * away * away, 0)  # Chan's formula; spans past the end count nothing
    merged = tl.join(mean, inverse_deviation(total, K, eps))
    tl.store(merged_ptr + rows[:, None] * 2 + tl.arange(0, 2)[None, :], merged, mask=(rows < M)[:, None])


def row_stats(x):
    """Partial row statistics of x [M, K]: float32 [ceil(K/128), M, 2], mean and sum of squared deviations."""
    m, k = matrix_shape(x)
    spans = triton.cdiv(k, SPAN)
    stats = torch.empty((spans, m, 2), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(m, SPAN) * spans,)
    launch.run(row_stats_kernel, grid, (x, stats, m, k, *x.stride()), {"SPAN": SPAN, "num_warps": 8})
    return stats


def merge_stats(stats, k, eps):
    """Partial row statistics [ceil(k/128), M, 2] -> float32 [M, 2]: mean and 1 / sqrt(variance + eps) of each row."""
    spans, m, _ = stats.shape
    merged = torch.empty((m, 2), dtype=torch.float32, device=stats.device)
    rows = 32
    options = {"SPAN": SPAN, "SPANS": triton.next_power_of_2(spans), "ROWS": rows, "num_warps": 4}
    launch.run(merge_stats_kernel, (triton.cdiv(m, rows),), (stats, merged, m, k, eps), options)
    return merged
