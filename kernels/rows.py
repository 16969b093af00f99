"""Whole rows in registers: equal parts side by side, since a tile's width is a power of two and a row's is not."""

import triton
import triton.language as tl

_PARTS = 7  # at most, below rows of 28,672
_VALUES = 6144  # values a program should hold, where its rows are short


@triton.jit
def part_columns(part, WIDTH: tl.constexpr):
    return part * WIDTH + tl.arange(0, WIDTH)


@triton.jit
def load_columns(row_ptrs, cols, stride, K, EVEN: tl.constexpr = False):
    """Columns of rows as float32 [rows, columns], zeros past column K. row_ptrs [rows, 1]. EVEN: none is past it."""
    ptrs = row_ptrs + cols.to(tl.int64)[None, :] * stride
    if EVEN:
        x = tl.load(ptrs)
    else:
        x = tl.load(ptrs, mask=(cols < K)[None, :], other=0.0)
    return x.to(tl.float32)


@triton.jit
def load_rows(row_ptrs, stride, K, PARTS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """Whole rows as a tuple of PARTS float32 tiles [rows, WIDTH], zeros past column K."""
    parts = ()
    for part in tl.static_range(PARTS):
        parts = parts + (load_columns(row_ptrs, part_columns(part, WIDTH), stride, K, EVEN),)
    return parts


@triton.jit
def sum_of_squares(x, PARTS: tl.constexpr):
    """Of each whole row, float32 [rows]."""
    squares = x[0] * x[0]
    for part in tl.static_range(1, PARTS):
        squares += x[part] * x[part]
    return tl.sum(squares, 1)


@triton.jit
def inside_rows(rows, cols, M, K, EVEN: tl.constexpr):
    """The mask of what lies in the matrix, [rows, columns]."""
    inside = (rows < M)[:, None]
    if not EVEN:
        inside = inside & (cols < K)[None, :]
    return inside


def row_tile(k: int, values: int = 112) -> dict:
    """ROWS, PARTS, WIDTH, EVEN and num_warps of a kernel that holds whole rows of k columns.

    1536 = 3 x 512, 5120 = 5 x 1024, 8960 <= 5 x 2048, 13824 <= 7 x 2048: where one power of two would compute up to
    1.8 times the values. values: of a thread at most. By 112 they are 80 to 112: all loads are under way at once, bytes
    are written 16 at a time, what a thread does once is a small share, and nothing spills where int8 is written.
    """
    width = min(max(triton.next_power_of_2(triton.cdiv(k, _PARTS)), 512), max(triton.next_power_of_2(k), 16))
    width = min(width, 4096)
    parts = triton.cdiv(k, width)
    rows = 1
    while 2 * rows * parts * width <= _VALUES:
        rows *= 2
    warps = 2
    while warps < 32 and rows * parts * width > values * 32 * warps:
        warps *= 2
    return {"ROWS": rows, "PARTS": parts, "WIDTH": width, "EVEN": parts * width == k, "num_warps": warps}
