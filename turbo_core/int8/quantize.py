"""W8A8 linears: 128x128-block and row-wise int8 quantization and the matrix product on it.

Weights are [N, K], activations [..., K]. Two formats, told apart by the shape of the scale:
block, scale [ceil(M/128), ceil(K/128)] (the published *-quant.pth); row, scale [M, 1] (ComfyUI's int8_tensorwise).
"""

import torch

from .. import dispatch
from ..dispatch import FLOATS, explained, learning
from ..errors import TurboError, refuse

BLOCK = 128
_TINY = 1e-8  # floor of the largest magnitude of a block, so that zeros quantize to zeros


def _cdiv(a, b):
    return -(-a // b)


def _check_matrix(x, name):
    if x.ndim != 2 or not x.is_floating_point():
        raise TurboError(f"{name} needs a float matrix [M, K], got {x.dtype} {list(x.shape)}")


def _kernel_quantizes(x):
    return x.dtype in FLOATS and not learning(x) and dispatch.use_triton(x.device, "quantize")


def check_scale(q, scale, name, formats=("block", "row")):
    """Raise TurboError unless the scale has the shape that the int8 matrix q needs in one of the formats."""
    rows, cols = q.shape
    shapes = {"block": block_scale_shape(rows, cols), "row": (rows, 1)}
    if tuple(scale.shape) not in [shapes[f] for f in formats]:
        expected = " or ".join(f"{list(shapes[f])} ({f} format)" for f in formats)
        raise TurboError(
            f"{name}: scale of an int8 [{rows}, {cols}] matrix must be {expected}, got {list(scale.shape)}"
        )


def block_scale_shape(rows: int, cols: int) -> tuple[int, int]:
    """Shape of the scale of an int8 [rows, cols] matrix in the block format."""
    return _cdiv(rows, BLOCK), _cdiv(cols, BLOCK)


def is_row_scale(q, scale) -> bool:
    """True for the row format. Where both shapes agree (one block column, one row) the formats coincide."""
    return scale.shape[1] == 1 and scale.shape[0] == q.shape[0]


def _blocks(x):
    """[M, K] -> [ceil(M/128), 128, ceil(K/128), 128], zero-padded."""
    m, k = x.shape
    mb, kb = block_scale_shape(m, k)
    if m % BLOCK or k % BLOCK:  # pad copies even when there is nothing to add
        x = torch.nn.functional.pad(x, (0, kb * BLOCK - k, 0, mb * BLOCK - m))
    return x.reshape(mb, BLOCK, kb, BLOCK)


def quantize_block(x, seed: int = 0):
    """Quantize in 128x128 blocks; ragged edge blocks use what is there.

    x: float [M, K]. Returns (int8 [M, K], float32 scale [ceil(M/128), ceil(K/128)]) with
    scale = max(amax, 1e-8) / 128 and q = saturate(round_half_even(x / amax * 128)): +amax becomes 127.
    seed > 0 rounds stochastically instead, so that small changes (a LoRA) survive on average.
    Source: TurboDiffusion ops/quant.
    """
    _check_matrix(x, "quantize_block")
    if torch.compiler.is_compiling() and seed == 0:
        return torch.ops.turbowan.quantize_block(x)
    return _quantize_block(x, seed)


@explained
def _quantize_block(x, seed=0):
    if seed == 0 and _kernel_quantizes(x):
        from ..kernels.quantize import quantize_block

        return quantize_block(x)
    x = x.float()
    m, k = x.shape
    blocks = _blocks(x)
    # largest and smallest apart: no copy of the whole for the magnitudes
    amax = torch.maximum(blocks.amax(3).amax(1), -blocks.amin(3).amin(1)).clamp_min(_TINY)[:, None, :, None]
    q = (blocks / amax).mul_(128.0)
    if seed > 0:
        generator = torch.Generator(device=x.device).manual_seed(seed)
        q = q.add_(torch.rand(q.shape, generator=generator, device=x.device)).floor_()
    q = q.round_().clamp_(-128, 127).to(torch.int8)
    q = q.reshape(q.shape[0] * BLOCK, q.shape[2] * BLOCK)[:m, :k].contiguous()
    return q, (amax / 128.0).view(blocks.shape[0], blocks.shape[2])


def dequantize_block(q, scale, dtype=torch.float32):
    """int8 [M, K] and scale [ceil(M/128), ceil(K/128)] -> float [M, K]."""
    check_scale(q, scale, "dequantize_block", ["block"])
    m, k = q.shape
    x = _blocks(q.float()) * scale[:, None, :, None]
    return x.reshape(x.shape[0] * BLOCK, x.shape[2] * BLOCK)[:m, :k].to(dtype).contiguous()


def quantize_rows(x, out=None):
    """Quantize each row by itself: scale = max(amax, 1e-8) / 127, symmetric, round half to even.

    x: float [M, K]. out: a pair as it returns, contiguous, to write to. Returns (int8 [M, K], float32 scale [M, 1]).
    Source: ComfyUI int8_tensorwise, per-row.
    """
    _check_matrix(x, "quantize_rows")
    for t, shape, dtype in zip(out or (), (x.shape, (x.shape[0], 1)), (torch.int8, torch.float32)):
        if t.shape != shape or t.dtype != dtype or t.device != x.device or not t.is_contiguous():
            refuse("quantize_rows", "out", f"contiguous {dtype} {list(shape)} beside x", f"{t.dtype} {list(t.shape)}")
    if not torch.compiler.is_compiling():
        return _quantize_rows(x, out)
    made = torch.ops.turbowan.quantize_rows(x)
    return made if out is None else tuple(t.copy_(new) for t, new in zip(out, made))


@explained
def _quantize_rows(x, out=None):
    if _kernel_quantizes(x):
        from ..kernels.quantize import quantize_rows

        return quantize_rows(x, out)
    x = x.float()
    amax = x.abs().amax(dim=1, keepdim=True).clamp_min(_TINY)
    scale = amax / torch.full((), 127.0, device=x.device)  # by a number, CUDA multiplies with its rounded reciprocal
    q = (x / scale).round_().clamp_(-128, 127)
    if out is None:
        return q.to(torch.int8).contiguous(), scale
    return out[0].copy_(q), out[1].copy_(scale)


def dequantize_rows(q, scale, dtype=torch.float32):
    """int8 [M, K] and scale [M, 1] -> float [M, K]."""
    check_scale(q, scale, "dequantize_rows", ["row"])
    return (q.float() * scale).to(dtype)


def dequantize(q, scale, dtype=torch.float32):
    """Either format, by the shape of the scale."""
    return (dequantize_rows if is_row_scale(q, scale) else dequantize_block)(q, scale, dtype)


torch.library.custom_op(
    "turbowan::quantize_block", lambda x: _quantize_block(x), mutates_args=(), schema="(Tensor x) -> (Tensor, Tensor)"
).register_fake(
    lambda x: (x.new_empty(x.shape, dtype=torch.int8), x.new_empty(block_scale_shape(*x.shape), dtype=torch.float32))
)
torch.library.custom_op(
    "turbowan::quantize_rows", lambda x: _quantize_rows(x), mutates_args=(), schema="(Tensor x) -> (Tensor, Tensor)"
).register_fake(lambda x: (x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0], 1), dtype=torch.float32)))
