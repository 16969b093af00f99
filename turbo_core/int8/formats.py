"""The two int8 formats: their scales, and the way back to floats."""

import torch

from ..errors import TurboError

BLOCK = 128


def block_scale_shape(rows: int, cols: int) -> tuple[int, int]:
    """Shape of the scale of an int8 [rows, cols] matrix in the block format."""
    return -(-rows // BLOCK), -(-cols // BLOCK)


def is_row_scale(q, scale) -> bool:
    """True for the row format. Where both shapes agree (one block column, one row) the formats coincide."""
    return scale.shape[1] == 1 and scale.shape[0] == q.shape[0]


def check_scale(q, scale, name, formats=("block", "row")):
    """Raise TurboError unless the scale has the shape that the int8 matrix q needs in one of the formats."""
    rows, cols = q.shape
    shapes = {"block": block_scale_shape(rows, cols), "row": (rows, 1)}
    if tuple(scale.shape) not in [shapes[f] for f in formats]:
        expected = " or ".join(f"{list(shapes[f])} ({f} format)" for f in formats)
        raise TurboError(
            f"{name}: scale of an int8 [{rows}, {cols}] matrix must be {expected}, got {list(scale.shape)}"
        )


def in_blocks(x):
    """[M, K] -> [ceil(M/128), 128, ceil(K/128), 128], zero-padded."""
    m, k = x.shape
    mb, kb = block_scale_shape(m, k)
    if m % BLOCK or k % BLOCK:  # pad copies even when there is nothing to add
        x = torch.nn.functional.pad(x, (0, kb * BLOCK - k, 0, mb * BLOCK - m))
    return x.reshape(mb, BLOCK, kb, BLOCK)


def dequantize_block(q, scale, dtype=torch.float32):
    """int8 [M, K] and scale [ceil(M/128), ceil(K/128)] -> float [M, K]."""
    check_scale(q, scale, "dequantize_block", ["block"])
    m, k = q.shape
    x = in_blocks(q.float()) * scale[:, None, :, None]
    return x.reshape(x.shape[0] * BLOCK, x.shape[2] * BLOCK)[:m, :k].to(dtype).contiguous()


def dequantize_rows(q, scale, dtype=torch.float32):
    """int8 [M, K] and scale [M, 1] -> float [M, K]."""
    check_scale(q, scale, "dequantize_rows", ["row"])
    return (q.float() * scale).to(dtype)


def dequantize(q, scale, dtype=torch.float32):
    """Either format, by the shape of the scale."""
    return (dequantize_rows if is_row_scale(q, scale) else dequantize_block)(q, scale, dtype)
