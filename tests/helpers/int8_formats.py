"""The published int8 formats in float64, block by block and row by row."""

import numpy as np
import torch

from turbo_core import int8

# one, a few, just under, at and just over a block, and two blocks with a ragged third
SIZES = (1, 5, 120, 127, 128, 129, 300)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = {"block": int8.quantize_block, "row": int8.quantize_rows}


def exact_blocks(x):
    """The published formula in float64, block by block: (x / scale before rounding, scale)."""
    x = x.double().numpy()
    m, k = x.shape
    value, scale = np.empty_like(x), np.empty((-(-m // 128), -(-k // 128)))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            here = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            amax = max(np.abs(x[here]).max(), float(np.float32(1e-8)))
            value[here] = x[here] / amax * 128
            scale[i, j] = amax / 128
    return value, scale


def exact_rows(x):
    """ComfyUI's definition: x over the float32 scale, in float32; amax / 2 would else be a tie at 63.5."""
    x = x.float().numpy()
    scale = np.maximum(np.abs(x).max(1, keepdims=True), np.float32(1e-8)) / np.float32(127)
    return (x / scale).astype(float), scale


EXACT = {"block": exact_blocks, "row": exact_rows}


def rounded(value):
    return np.clip(np.rint(value), -128, 127)
