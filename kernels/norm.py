"""LayerNorm with modulation to int8, row statistics and RMSNorm, computed in float32.

Row statistics are partial: (mean, sum of squared deviations) of each span of 128 columns, as the epilogue of a matrix
product leaves them. A scale of the block format spans 128 rows and 128 columns while a norm needs whole rows, so the
block format takes two launches: one merges the partial statistics into (mean, 1 / deviation) of each row, 8 bytes a
row, the other gives every 128 x 128 block a program of its own (23,640 at 14B and 720p, 3,072 at 1.3B and 480p). A
program that merged for itself would read 320 bytes of statistics for each 256 bytes of a row.
Bytes per value of a bfloat16 x: 3.1 with statistics given (2 read, 1 written, 0.06 of statistics), 5.1 without; 3 in
the row format, which has the row in registers; 2.1 for the statistics; 4 for RMSNorm.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .quantize import check_operand, matrix_shape
from .rounding import block_scale, magnitude, row_scale, to_int8
from .row_stats import SPAN, inverse_deviation, merge_stats, row_stats
from .rows import inside_rows, load_columns, load_rows, part_columns, row_tile, sum_of_squares


@triton.jit
def load_vector(ptr, cols, K, y, EVEN: tl.constexpr):
    if y.shape[1] <= 128:
        ptrs, inside = (ptr + cols)[None, :], (cols < K)[None, :]
    else:
        # spread over y's rows before the load: a long vector would take its way to y's layout through shared memory
        ptrs, inside = tl.broadcast_to((ptr + cols)[None, :], y.shape), (cols < K)[None, :]
    return (tl.load(ptrs) if EVEN else tl.load(ptrs, mask=inside, other=0.0)).to(tl.float32)


@triton.jit
def deviations(x, mean, cols, K, EVEN: tl.constexpr):
    """x - mean, zeros past column K."""
    return x - mean if EVEN else tl.where((cols < K)[None, :], x - mean, 0.0)


@triton.jit
def affine(y, cols, K, weight_ptr, bias_ptr, EVEN: tl.constexpr = False):
    """y * weight + bias, each [K] or None. Zeros past column K stay zeros, here and in modulate."""
    if weight_ptr is not None:
        y *= load_vector(weight_ptr, cols, K, y, EVEN)
    if bias_ptr is not None:
        y += load_vector(bias_ptr, cols, K, y, EVEN)
    return y


@triton.jit
def modulate_group(y, cols, K, group, shift_ptr, scale_ptr, EVEN: tl.constexpr):
    if scale_ptr is not None:
        y *= 1.0 + load_vector(scale_ptr + group * K, cols, K, y, EVEN)
    if shift_ptr is not None:
        y += load_vector(shift_ptr + group * K, cols, K, y, EVEN)
    return y


@triton.jit
def modulate(y, cols, K, rows, first, last, GROUP, shift_ptr, scale_ptr, EVEN: tl.constexpr = False):
    """y * (1 + scale) + shift, each [groups, K] or None; rows first to last, GROUP of them in a group (None: all)."""
    if GROUP is None:
        y = modulate_group(y, cols, K, 0, shift_ptr, scale_ptr, EVEN)
    else:
        # nearly always one group; a vector for every row would be four times the bytes of x
        for group in range(first // GROUP, last // GROUP + 1):
            mine = modulate_group(y, cols, K, tl.cast(group, tl.int64), shift_ptr, scale_ptr, EVEN)
            y = tl.where((rows // GROUP == group)[:, None], mine, y)
    return y


@triton.jit(do_not_specialize=["M"])
def layer_norm_block_kernel(
    x_ptr,  # [M, K] any strides
    stats_ptr,  # [M, 2] float32: mean, 1 / deviation
    weight_ptr,  # [K] or None
    bias_ptr,  # [K] or None
    shift_ptr,  # [groups, K] or None
    scale_ptr,  # [groups, K] or None
    q_ptr,  # [M, K] int8
    q_scale_ptr,  # [ceil(M/BLOCK), ceil(K/BLOCK)] float32
    M,
    K,
    GROUP,  # rows of a group, None: all of them
    stride_m,
    stride_k,
    EVEN_K: tl.constexpr,  # BLOCK divides K
    BLOCK: tl.constexpr,
):
    # one program owns one BLOCK x BLOCK block of q, in registers from its one read to its one write
    blocks_k = tl.cdiv(K, BLOCK)
    first = tl.program_id(0) // blocks_k * BLOCK
    rows = first + tl.arange(0, BLOCK)
    cols = tl.program_id(0) % blocks_k * BLOCK + tl.arange(0, BLOCK)
    # rows past the end repeat the last one, which leaves the block's maximum as it is
    source = tl.minimum(rows, M - 1)
    y = load_columns(x_ptr + source.to(tl.int64)[:, None] * stride_m, cols, stride_k, K, EVEN_K)
    y = (y - tl.load(stats_ptr + source * 2)[:, None]) * tl.load(stats_ptr + source * 2 + 1)[:, None]
    if not EVEN_K:
        y = tl.where((cols < K)[None, :], y, 0.0)
    last = tl.minimum(first + BLOCK, M) - 1
    y = affine(y, cols, K, weight_ptr, bias_ptr, EVEN_K)
    y = modulate(y, cols, K, source, first, last, GROUP, shift_ptr, scale_ptr, EVEN_K)
    q_scale = block_scale(tl.max(magnitude(y)))
    tl.store(q_scale_ptr + tl.program_id(0), q_scale)
    target = rows.to(tl.int64)[:, None] * K + cols[None, :]
    tl.store(q_ptr + target, to_int8(y, q_scale), mask=inside_rows(rows, cols, M, K, EVEN_K))


@triton.jit(do_not_specialize=["M"])
def layer_norm_rows_kernel(
    x_ptr,  # [M, K] any strides
    weight_ptr,  # [K] or None
    bias_ptr,  # [K] or None
    shift_ptr,  # [groups, K] or None
    scale_ptr,  # [groups, K] or None
    q_ptr,  # [M, K] int8
    q_scale_ptr,  # [M] float32
    M,
    K,
    GROUP,  # rows of a group, None: all of them
    eps,
    stride_m,
    stride_k,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,  # PARTS * WIDTH is K
):
    # one program owns ROWS whole rows, in registers from their one read to their one write
    first = tl.program_id(0) * ROWS
    last = tl.minimum(first + ROWS, M) - 1
    rows = first + tl.arange(0, ROWS)
    source = tl.minimum(rows, M - 1)
    x = load_rows(x_ptr + source.to(tl.int64)[:, None] * stride_m, stride_k, K, PARTS, WIDTH, EVEN)
    total = x[0]
    for part in tl.static_range(1, PARTS):
        total += x[part]
    mean = (tl.sum(total, 1) / K)[:, None]
    squares = tl.zeros_like(total)
    for part in tl.static_range(PARTS):
        deviation = deviations(x[part], mean, part_columns(part, WIDTH), K, EVEN)
        squares += deviation * deviation
    inverse = inverse_deviation(tl.sum(squares, 1), K, eps)[:, None]
    normed = ()
    bits = tl.zeros_like(total).to(tl.int32)
    for part in tl.static_range(PARTS):
        cols = part_columns(part, WIDTH)
        y = deviations(x[part], mean, cols, K, EVEN) * inverse
        y = affine(y, cols, K, weight_ptr, bias_ptr, EVEN)
        y = modulate(y, cols, K, source, first, last, GROUP, shift_ptr, scale_ptr, EVEN)
        bits = tl.maximum(bits, magnitude(y))
        normed = normed + (y,)
    q_scale = row_scale(tl.max(bits, 1))
    tl.store(q_scale_ptr + rows, q_scale, mask=rows < M)
    for part in tl.static_range(PARTS):
        cols = part_columns(part, WIDTH)
        target = rows.to(tl.int64)[:, None] * K + cols[None, :]
        q = to_int8(normed[part], q_scale[:, None])
        tl.store(q_ptr + target, q, mask=inside_rows(rows, cols, M, K, EVEN))


@triton.jit(do_not_specialize=["M"])
def rms_norm_kernel(
    x_ptr,  # [M, K] any strides
    weight_ptr,  # [K]
    y_ptr,  # [M, K]
    M,
    K,
    eps,
    stride_m,
    stride_k,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,  # PARTS * WIDTH is K
):
    # one program owns ROWS whole rows, in registers from their one read to their one write
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = load_rows(x_ptr + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * stride_m, stride_k, K, PARTS, WIDTH, EVEN)
    inverse = inverse_deviation(sum_of_squares(x, PARTS), K, eps)[:, None]
    for part in tl.static_range(PARTS):
        cols = part_columns(part, WIDTH)
        target = rows.to(tl.int64)[:, None] * K + cols[None, :]
        y = affine(x[part] * inverse, cols, K, weight_ptr, None, EVEN).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + target, y, mask=inside_rows(rows, cols, M, K, EVEN))


def layer_norm_quantize(x, eps, weight=None, bias=None, shift=None, scale=None, stats=None, rows=False):
    """Quantize (LayerNorm(x) * weight + bias) * (1 + scale) + shift, all in float32, to int8.

    x: float16, bfloat16 or float32 [M, K], any strides. weight, bias: [K]. shift, scale: [groups, K] for groups of
    M / groups consecutive rows. All contiguous, each may be None. stats: row_stats(x), or None to read x for it; the
    row format does without. Returns (q int8 [M, K], float32 scale [ceil(M/128), ceil(K/128)], or [M, 1] with rows).
    """
    m, k = matrix_shape(x)
    groups = max(1 if t is None else t.shape[0] for t in (shift, scale))
    for name, t, shape in (
        ("weight", weight, (k,)), ("bias", bias, (k,)), ("shift", shift, (groups, k)), ("scale", scale, (groups, k)),
        ("stats", None if rows else stats, (triton.cdiv(k, SPAN), m, 2)),
    ):  # fmt: skip
        check_operand(name, t, shape, x.device)
    if groups == 0 or m % groups:
        raise ValueError(f"{m} rows do not divide into {groups} groups")
    blocks = triton.cdiv(m, SPAN), triton.cdiv(k, SPAN)
    q = torch.empty((m, k), dtype=torch.int8, device=x.device)
    q_scale = torch.empty((m, 1) if rows else blocks, dtype=torch.float32, device=x.device)
    operands = weight, bias, shift, scale, q, q_scale, m, k, None if groups == 1 else m // groups
    if rows:
        tile = row_tile(k)
        launch.run(layer_norm_rows_kernel, (triton.cdiv(m, tile["ROWS"]),), (x, *operands, eps, *x.stride()), tile)
    else:
        merged = merge_stats(row_stats(x) if stats is None else stats, k, eps)
        options = {"EVEN_K": k % SPAN == 0, "BLOCK": SPAN, "num_warps": 8}
        launch.run(layer_norm_block_kernel, (q_scale.numel(),), (x, merged, *operands, *x.stride()), options)
    return q, q_scale


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight of each row of x [M, K], computed in float32, in x's dtype. weight: [K]."""
    m, k = matrix_shape(x)
    check_operand("weight", weight, (k,), x.device)
    y = torch.empty((m, k), dtype=x.dtype, device=x.device)
    tile = row_tile(k, values=56) | {"EVEN": False}  # more values, or none that is masked, spill on sm_80
    launch.run(rms_norm_kernel, (triton.cdiv(m, tile["ROWS"]),), (x, weight, y, m, k, eps, *x.stride()), tile)
    return y
