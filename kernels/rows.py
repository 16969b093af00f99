"""Whole rows in registers: equal parts side by side, since a tile's width is a power of two and a row's is not."""

import triton
import triton.language as tl

_PARTS = 7  # at most, below rows of 28,672
_VALUES = 6144  # values a program should hold, where its rows are short


@triton.jit
def part_columns(part, WIDTH: tl.constexpr):
    return part * WIDTH + tl.arange(0, WIDTH)


@triton.jit
def load_columns(row_ptrs, cols, stride, K):
    """Columns of rows as float32 [rows, columns], zeros past column K. row_ptrs [rows, 1]."""
    return tl.load(row_ptrs + cols.to(tl.int64)[None, :] * stride, mask=(cols < K)[None, :], other=0.0).to(tl.float32)


@triton.jit
def load_rows(row_ptrs, stride, K, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """Whole rows as a tuple of PARTS float32 tiles [rows, WIDTH], zeros past column K."""
    parts = ()
    for part in tl.static_range(PARTS):
        parts = parts + (load_columns(row_ptrs, part_columns(part, WIDTH), stride, K),)
    return parts


def row_tile(k: int) -> dict:
    """ROWS, PARTS, WIDTH and num_warps of a kernel that holds whole rows of k columns.

    1536 = 3 x 512, 5120 = 5 x 1024, 8960 <= 5 x 2048, 13824 <= 7 x 2048: where one power of two would compute up to
    1.8 times the values. 40 to 56 values in a thread: all loads are under way at once and nothing spills.
    """
    width = min(max(triton.next_power_of_2(triton.cdiv(k, _PARTS)), 512), max(triton.next_power_of_2(k), 16))
    width = min(width, 4096)
    parts = triton.cdiv(k, width)
    rows = 1
    while 2 * rows * parts * width <= _VALUES:
        rows *= 2
    warps = 4
    while warps < 32 and rows * parts * width > 56 * 32 * warps:
        warps *= 2
    return {"ROWS": rows, "PARTS": parts, "WIDTH": width, "num_warps": warps}
