"""Products of int8 matrices in plain torch, a tile at a time.

Matrices are [M, K] and [N, K] with float32 scales in the block or the row format (formats.py). A CPU computes tiles so
small that their int32 sums stay in its cache while they are scaled and added; other devices compute whole slices of
rows. Tiles are whole blocks, and the numbers do not depend on them.
"""

import torch

from ..devices import has_int_mm, int_mm_pays
from .formats import BLOCK, dequantize_block

SLICE = 1 << 24  # elements of x or y that other devices compute at a time
TILE = 512, 1536  # rows for each thread and columns of a CPU's tile: 3 MB of sums, and a Wan model's width at once
EXACT = 1024  # products that float32 sums without rounding: 128 * 128 * 1024 = 2^24


def products(quantized, m, w_q, w_scale, rows: bool, bias, dtype, y=None):
    """Yield (slice of rows, slice of columns, that part of x w^T + bias in float32) until all of [M, N] is there.

    quantized(slice of rows) -> int8 x [rows, K], its scale: asked for once for each slice, in order. rows: the row
    format. dtype: that of the result to come. A part may be changed in place, and is overwritten by the next one. y:
    [M, N], where the parts are going to: where that saves a pass they are views of it.
    """
    w_q, n = w_q.contiguous(), w_q.shape[0]
    bias = None if bias is None else bias.float()
    in_place = rows and y is not None and y.dtype == torch.float32 and not torch.compiler.is_compiling()
    multiply = _multiplier(w_q, w_scale, rows, bias, dtype)
    tall, wide = tile(w_q, rows)
    for start in range(0, m, tall):
        here = slice(start, min(start + tall, m))
        x = quantized(here)
        for first in range(0, n, wide):
            columns = slice(first, min(first + wide, n))
            yield here, columns, multiply(*x, columns, y[here, columns] if in_place else None)


def slice_rows(columns: int, elements: int) -> int:
    """Rows in a slice of so many elements: whole blocks, so that a slice has the scales that it has in the whole."""
    return max(1, elements // max(1, columns) // BLOCK) * BLOCK


def tile(w_q, by_rows: bool):
    """(rows, columns) that are computed at a time; twice as many rows in the row format, which adds nothing up."""
    n, k = w_q.shape
    if not has_cache(w_q.device):
        return slice_rows(max(n, k), SLICE), max(1, n)
    rows, columns = TILE
    parts = -(-n // columns)
    even = -(-n // (parts * BLOCK)) * BLOCK if n else 1
    return min((2 if by_rows else 1) * rows * threads(), slice_rows(max(even, k), SLICE)), even


def threads() -> int:
    """Of torch on this CPU; 1 while torch.compile traces, which cannot ask."""
    return 1 if torch.compiler.is_compiling() else torch.get_num_threads()


def has_cache(device) -> bool:
    """True where a tile's sums stay near: elsewhere reading and writing y once for each block of columns takes longer
    than a product of floats."""
    return device.type == "cpu"


def _multiplier(w_q, w_scale, rows, bias, dtype):
    """multiply(x_q, x_scale, slice of columns, None or where the result may lie) -> their product and bias, float32."""
    dots, sums = Room(), Room()
    if rows:
        by_column = w_scale.t()

        def multiply(x_q, x_scale, columns, place):
            y = int_mm(x_q, w_q[columns], dots).mul_(x_scale)
            place = y if place is None else place
            if bias is None:
                return torch.mul(y, by_column[:, columns], out=place)
            return torch.addcmul(bias[columns], y, by_column[:, columns], out=place)

        return multiply
    if not has_cache(w_q.device):
        # in the result's own half precision, whose rounding is a tenth of int8's: tensor cores take no float32
        weight = dequantize_block(w_q, w_scale, dtype if dtype.itemsize == 2 else torch.float32)

        def multiply(x_q, x_scale, columns, _):
            y = (dequantize_block(x_q, x_scale, weight.dtype) @ weight[columns].t()).float()
            return y if bias is None else y.add_(bias[columns])

        return multiply
    by_block = w_scale.t().repeat_interleave(BLOCK, 1)  # [K-blocks, N]: a row of it is read in one go

    def multiply(x_q, x_scale, columns, _):
        m, part = len(x_q), w_q[columns]
        y = sums.take(m, len(part), x_scale).zero_()
        x_scale = x_scale.t().repeat_interleave(BLOCK, 1)[:, :m, None]
        for x_b, x_s, w_b, w_s in zip(x_q.split(BLOCK, 1), x_scale, part.split(BLOCK, 1), by_block[:, columns]):
            y.addcmul_(int_mm(x_b, w_b, dots).mul_(x_s), w_s)
        return y if bias is None else y.add_(bias[columns])

    return multiply


class Room:
    """Memory for one matrix after another: a fresh one each time costs a CPU as much as what is written to it."""

    def __init__(self):
        self.held = None

    def take(self, rows, columns, like):
        """A contiguous float32 [rows, columns] of any content."""
        if self.held is None or self.held.numel() < rows * columns:
            self.held = None  # gone before the next is made
            self.held = torch.empty(rows * columns, dtype=torch.float32, device=like.device)
        return self.held[: rows * columns].view(rows, columns)

    def divided(self, x, by):
        """x / by, float32 of x's shape."""
        return torch.div(x, by, out=self.take(len(x), x[:1].numel(), x).view(x.shape))


def int_mm(a, b, room=None):
    """int8 [M, K] x int8 [N, K]^T -> float32 [M, N], the exact sums rounded once; where the device is faster at floats
    or has nothing else, the exact sums of EXACT products added in float32. room: where the result may lie."""
    y = (room or Room()).take(len(a), len(b), a)
    if has_int_mm(a.device) and int_mm_pays(a.device):
        m, k = a.shape
        # torch 2.13 on a CPU returns garbage for K = 1, which the last block of a ragged K can have
        if k > 1 if a.device.type == "cpu" else m > 16 and k % 8 == 0 and b.shape[0] % 8 == 0:
            return y.copy_(torch._int_mm(a, b.t(), out=y.view(torch.int32)))  # number by number in its own place
    for i, (x, w) in enumerate(zip(a.split(EXACT, 1), b.split(EXACT, 1))):
        part = torch.empty_like(y) if i else y
        torch.mm(x.float(), w.float().t(), out=part)  # out: as written, whatever torch.autocast says
        y = y.add_(part) if i else part
    return y
