"""W8A8 linears: 128x128-block and row-wise int8 quantization and the matrix product on it.

Weights are [N, K], activations [..., K]. Two formats, told apart by the shape of the scale:
block, scale [ceil(M/128), ceil(K/128)] (the published *-quant.pth); row, scale [M, 1] (ComfyUI's int8_tensorwise).
"""

import torch

from . import paths
from .devices import has_int_mm, int_mm_pays
from .errors import TurboError
from .int8_paths import int8_path as int8_path
from .int8_paths import kitchen
from .operands import FLOATS, check_device, check_float, explained, learning, refuse

BLOCK = 128
_TINY = 1e-8  # floor of the largest magnitude of a block, so that zeros quantize to zeros
SLICE = 1 << 24  # elements of x or y computed at a time: their int32 and float32 forms stay small beside them


def _cdiv(a, b):
    return -(-a // b)


def _check_matrix(x, name):
    if x.ndim != 2 or not x.is_floating_point():
        raise TurboError(f"{name} needs a float matrix [M, K], got {x.dtype} {list(x.shape)}")


def _kernel_quantizes(x):
    return x.dtype in FLOATS and not learning(x) and paths.use_triton(x.device, "quantize")


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
        from .kernels.quantize import quantize_block

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
        from .kernels.quantize import quantize_rows

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


def _int_mm(a, b):
    """int8 [M, K] x int8 [N, K]^T -> int32 [M, N], exact; or float32 where the device is faster at it or has nothing
    else, exact up to K = 1024, beyond that the exact sums of 1024 products added in float32."""
    if has_int_mm(a.device) and int_mm_pays(a.device):
        m, k = a.shape
        # torch 2.13 on a CPU returns garbage for K = 1, which the last block of a ragged K can have
        if k > 1 if a.device.type == "cpu" else m > 16 and k % 8 == 0 and b.shape[0] % 8 == 0:
            return torch._int_mm(a, b.t())
    # float32 holds every partial sum of 1024 products exactly (128 * 128 * 1024 = 2^24)
    a, b = a.float(), b.float()
    return sum(x @ y.t() for x, y in zip(a.split(1024, 1), b.split(1024, 1)))


def _mm_rows(x_q, x_scale, w_q, w_scale):
    return _int_mm(x_q, w_q).float().mul_(x_scale).mul_(w_scale.t())


def _mm_block(x_q, x_scale, w_q, w_scale):
    m, n = x_q.shape[0], w_q.shape[0]
    x_scale = x_scale.repeat_interleave(BLOCK, 0)[:m]
    w_scale = w_scale.repeat_interleave(BLOCK, 0)[:n]
    y = x_scale.new_zeros(m, n)
    for b, (x_b, w_b) in enumerate(zip(x_q.split(BLOCK, 1), w_q.split(BLOCK, 1))):
        dot = _int_mm(x_b.contiguous(), w_b.contiguous()).float()
        y.addcmul_(dot.mul_(x_scale[:, b, None]), w_scale[:, b][None, :])
    return y


def _mm_float(x_q, x_scale, weight):
    return dequantize_block(x_q, x_scale, weight.dtype) @ weight


def _has_slow_passes(device) -> bool:
    """True where reading and writing y once for each block of columns takes longer than a product of floats."""
    return device.type != "cpu"


def int8_linear(x, weight_q, weight_scale, bias=None):
    """x @ dequantize(weight).T + bias with x quantized on the fly in the weight's own format.

    x: float [..., K]; all leading axes count as rows, so in the block format 128 consecutive tokens share a scale.
    weight_q: int8 [N, K]. weight_scale: float [ceil(N/128), ceil(K/128)] or [N, 1]. bias: float [N] or None.
    Returns [..., N] in x's dtype; accumulated in float32. Raises TurboError, before any launch, where type, shape or
    device of an operand does not fit.
    """
    name = "int8_linear"
    if weight_q.dtype != torch.int8 or weight_q.ndim != 2:
        raise TurboError(f"int8_linear: weight must be int8 [N, K], got {weight_q.dtype} {list(weight_q.shape)}")
    if x.shape[-1] != weight_q.shape[1]:
        raise TurboError(f"int8_linear: x has {x.shape[-1]} channels, the weight {weight_q.shape[1]}")
    check_scale(weight_q, weight_scale, "int8_linear")
    n = weight_q.shape[0]
    if not x.is_floating_point():
        raise TurboError(f"int8_linear: x must be float, got {x.dtype}")
    if not weight_scale.is_floating_point():
        refuse(name, "the scale of the weight", "float", weight_scale.dtype)
    check_device(name, "the weight", weight_q, x.device)
    check_device(name, "the scale of the weight", weight_scale, x.device)
    if bias is not None:
        check_float(name, "bias", bias, (n,), x.device)
    linear = torch.ops.turbowan.int8_linear if torch.compiler.is_compiling() else _linear
    return linear(x.reshape(-1, x.shape[-1]), weight_q, weight_scale.float(), bias).view(*x.shape[:-1], n)


def slice_rows(weight_q) -> int:
    """Rows of x computed at a time: whole blocks of them, so that a slice has the scales that it has in the whole."""
    return max(1, SLICE // max(1, *weight_q.shape) // BLOCK) * BLOCK


def multiplier(weight_q, weight_scale, rows: bool, dtype):
    """(multiply, arguments): multiply(x_q, x_scale, *arguments) is the product of quantized rows in torch.

    rows: the row format. dtype: that of the result to come. Float32 [M, N], or dtype where floats are multiplied.
    """
    if rows:
        return _mm_rows, (weight_q, weight_scale)
    if not _has_slow_passes(weight_q.device):
        return _mm_block, (weight_q, weight_scale)
    # in the result's own half precision, whose rounding is a tenth of int8's: tensor cores take no float32
    dtype = dtype if dtype.itemsize == 2 else torch.float32
    return _mm_float, (dequantize_block(weight_q, weight_scale, dtype).t(),)


@explained
def _linear(x, weight_q, weight_scale, bias):
    rows = is_row_scale(weight_q, weight_scale)
    if learning(x, weight_scale, bias):
        return _torch_linear(x, weight_q, weight_scale, bias, rows)
    if _kernel_quantizes(x) and paths.use_triton(x.device, "int8_mm"):
        from .kernels.int8_mm import int8_mm

        weight = weight_q.contiguous(), weight_scale.contiguous()
        bias = None if bias is None else bias.contiguous()
        return int8_mm(*(_quantize_rows if rows else _quantize_block)(x), *weight, bias, x.dtype)
    if rows and len(x) and x.dtype in FLOATS and kitchen(x.device):
        return kitchen(x.device).int8_linear(x, weight_q, weight_scale, bias, out_dtype=x.dtype)
    return _torch_linear(x, weight_q, weight_scale, bias, rows)


def _torch_linear(x, weight_q, weight_scale, bias, rows):
    m, n = x.shape[0], weight_q.shape[0]
    step = slice_rows(weight_q)
    quantize = _quantize_rows if rows else _quantize_block
    multiply, weight = multiplier(weight_q, weight_scale, rows, x.dtype)
    y = x.new_empty(m, n)
    for start in range(0, m, step):
        part = multiply(*quantize(x[start : start + step]), *weight)
        y[start : start + step] = part if bias is None else part.add_(bias)
    return y


# torch.compile gets one node instead of thousands of slices and column blocks unrolled
_SCHEMA = "(Tensor x, Tensor weight_q, Tensor weight_scale, Tensor? bias) -> Tensor"
torch.library.custom_op("turbowan::int8_linear", _linear, mutates_args=(), schema=_SCHEMA).register_fake(
    lambda x, weight_q, weight_scale, bias: x.new_empty(x.shape[0], weight_q.shape[0])
)
torch.library.custom_op(
    "turbowan::quantize_block", lambda x: _quantize_block(x), mutates_args=(), schema="(Tensor x) -> (Tensor, Tensor)"
).register_fake(
    lambda x: (x.new_empty(x.shape, dtype=torch.int8), x.new_empty(block_scale_shape(*x.shape), dtype=torch.float32))
)
torch.library.custom_op(
    "turbowan::quantize_rows", lambda x: _quantize_rows(x), mutates_args=(), schema="(Tensor x) -> (Tensor, Tensor)"
).register_fake(lambda x: (x.new_empty(x.shape, dtype=torch.int8), x.new_empty((x.shape[0], 1), dtype=torch.float32)))
