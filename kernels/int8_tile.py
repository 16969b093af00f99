"""What every int8 matrix product does to a tile: its place in the order of tiles, and its way out."""

import triton
import triton.language as tl

from .rounding import block_scale, magnitude, to_int8

MAGIC = tl.constexpr(0x4B400000)  # the bits of 1.5 * 2^23: an int32 sum started here reads as a float32 that is
MAGIC_VALUE = tl.constexpr(12582912.0)  # this value too large, exactly while |sum| < 2^22 (128 products of int8)


@triton.jit
def tile_place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row, column) of a tile: GROUP_M rows of tiles go column by column, sharing weights in the L2 cache."""
    in_group = GROUP_M * tiles_n
    first = tile // in_group * GROUP_M
    rows = min(tiles_m - first, GROUP_M)
    return first + tile % in_group % rows, tile % in_group // rows


@triton.jit
def gelu_tanh(x):
    """x / 2 * (1 + tanh(u)) = x / (1 + exp(-2 u)): no tanh, which not every backend has; exp may overflow to 0."""
    u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return x / (1.0 + tl.exp(-u))


@triton.jit
def row_statistics(y, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr):
    """Mean and sum of squared deviations of each row's spans: float32 [ROWS, COLUMNS / SPAN] each.

    y is 0 beyond `columns`, the number of columns that are there.
    """
    spans = tl.reshape(y, (ROWS, COLUMNS // SPAN, SPAN))
    at = tl.arange(0, COLUMNS // SPAN) * SPAN
    count = tl.minimum(tl.maximum(columns - at, 1), SPAN).to(tl.float32)
    mean = tl.sum(spans, 2) / count[None, :]
    there = (at[:, None] + tl.arange(0, SPAN)[None, :]) < columns
    away = tl.where(there[None, :, :], spans - mean[:, :, None], 0.0)
    return mean, tl.sum(away * away, 2)


@triton.jit
def finish_tile(
    y,  # float32 [BLOCK_M, BLOCK_N]: the product of the tile, scaled
    m0,
    n0,  # the tile's first row and column
    which,  # 0, 1, 2: q, k, v
    y_ptr,  # [M, N], or [3, M, N] for q, k, v
    bias_ptr,  # [N] or None
    y_scale_ptr,  # [ceil(M / 128), ceil(N / 128)]: y is int8; or None
    residual_ptr,  # [M, N] or None
    gate_ptr,  # [groups, N] or None
    stats_ptr,  # [ceil(N / 128), M, 2] or None
    squares_ptr,  # [2, ceil(N / 128), M] or None
    M,
    N,
    group_rows,
    GELU: tl.constexpr,
    ONE_GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr,
):
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    there = n0 + columns < N
    inside = (m0 + rows < M)[:, None] & there[None, :]
    spans = tl.cdiv(N, SPAN)
    # the tile's corner in 64 bits, places within it in 32
    corner = (which * tl.cast(M, tl.int64) + m0) * N + n0
    place = rows[:, None] * N + columns[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n0 + columns, there, other=0.0).to(tl.float32)[None, :]
    if GELU:
        y = gelu_tanh(y)
    if residual_ptr is not None:
        if gate_ptr is not None:
            if ONE_GATE:
                y *= tl.load(gate_ptr + n0 + columns, there, other=0.0)[None, :]
            else:
                group = tl.minimum(m0 + rows, M - 1) // group_rows
                y *= tl.load(gate_ptr + group[:, None] * N + (n0 + columns)[None, :], there[None, :], other=0.0)
        y += tl.load(residual_ptr + corner + place, inside, other=0.0).to(tl.float32)
    if y_scale_ptr is not None:
        # the tile is one scale block
        scale = block_scale(tl.max(magnitude(tl.where(inside, y, 0.0))))
        tl.store(y_scale_ptr + m0 // SPAN * spans + n0 // SPAN, scale)
        out = to_int8(y, scale)
    else:
        out = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + corner + place, out, inside)
    # of y as it is stored, which is what the norm reads
    span = n0 // SPAN + tl.arange(0, BLOCK_N // SPAN)
    at = span[None, :].to(tl.int64) * M + m0 + rows[:, None]
    known = (m0 + rows < M)[:, None] & (span < spans)[None, :]
    if stats_ptr is not None:
        mean, m2 = row_statistics(tl.where(inside, out.to(tl.float32), 0.0), N - n0, BLOCK_M, BLOCK_N, SPAN)
        tl.store(stats_ptr + 2 * at, mean, known)
        tl.store(stats_ptr + 2 * at + 1, m2, known)
    if squares_ptr is not None:  # noqa: SIM102  this one is decided in the compiler, the next on the card
        if which < 2:
            stored = tl.where(inside, out.to(tl.float32), 0.0)
            squares = tl.sum(tl.reshape(stored * stored, (BLOCK_M, BLOCK_N // SPAN, SPAN)), 2)
            tl.store(squares_ptr + which * tl.cast(spans, tl.int64) * M + at, squares, known)
