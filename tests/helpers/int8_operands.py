"""Operands of the int8 products."""

import torch

from tests.helpers.tensors import gaussian
from turbo_core.int8 import reference

FORMATS = ("block", "row")
SHAPES = [  # M, N, K
    (1, 64, 128),  # one row, half a tile of columns
    (5, 200, 200),  # ragged N and K, in the second block of each
    (120, 256, 384),  # one block of rows, ragged as 32760 tokens end
    (248, 200, 384),  # two of them, ragged N
]


def quantized(fmt, rows, k, seed):
    """(int8 [rows, k], scale), quantized in torch, with scales that differ: mixed up, they would be seen."""
    x = gaussian(rows, k, seed=seed)
    x[rows // 2 :] *= 4
    x[:, k // 2 :] *= 3
    if fmt == "block":
        return reference.quantize_block(x)
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale).round().to(torch.int8), scale
