"""Quantization of a float matrix to int8, in 128x128 blocks or row by row."""

import torch

from ..dispatch import FLOATS, explained
from ..errors import TurboError, refuse
from . import reference
from .paths import operations


def quantize_block(x, seed: int = 0):
    """Quantize in 128x128 blocks; ragged edge blocks use what is there.

    x: float [M, K]. Returns (int8 [M, K], float32 scale [ceil(M/128), ceil(K/128)]) with
    scale = max(amax, 1e-8) / 128 and q = saturate(round_half_even(x / amax * 128)): +amax becomes 127.
    seed > 0 rounds stochastically instead, so that small changes (a LoRA) survive on average.
    Raises TurboError. Source: TurboDiffusion ops/quant.
    """
    _check_matrix(x, "quantize_block")
    if seed > 0:
        return reference.quantize_block(x, seed)
    with explained():
        return _operations(x).quantize_block(x)


def quantize_rows(x, out=None):
    """Quantize each row by itself: scale = max(amax, 1e-8) / 127, symmetric, round half to even.

    x: float [M, K]. out: a pair as it returns, contiguous, to write to. Returns (int8 [M, K], float32 scale [M, 1]).
    Raises TurboError. Source: ComfyUI int8_tensorwise, per-row.
    """
    _check_matrix(x, "quantize_rows")
    for t, shape, dtype in zip(out or (), (x.shape, (x.shape[0], 1)), (torch.int8, torch.float32)):
        if t.shape != shape or t.dtype != dtype or t.device != x.device or not t.is_contiguous():
            refuse("quantize_rows", "out", f"contiguous {dtype} {list(shape)} beside x", f"{t.dtype} {list(t.shape)}")
    with explained():
        if out is None:
            return _operations(x).quantize_rows(x)
        if not torch.compiler.is_compiling():
            return _operations(x).quantize_rows(x, out)
    made = _operations(x).quantize_rows(x)  # an operator makes its results itself
    return tuple(t.copy_(new) for t, new in zip(out, made))


def _check_matrix(x, name):
    if x.ndim != 2 or not x.is_floating_point():
        raise TurboError(f"{name} needs a float matrix [M, K], got {x.dtype} {list(x.shape)}")


def _operations(x):
    return operations(x.device, ("quantize",), x) if x.dtype in FLOATS else reference
