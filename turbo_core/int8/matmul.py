"""The int8 matrix product and the forms of it that a Wan block needs: y = x w^T on quantized x and w.

x_q int8 [M, K] and w_q int8 [N, K] come with float32 scales in one format for both, told by their shapes: block,
[ceil(M/128), ceil(K/128)] and [ceil(N/128), ceil(K/128)], or row, [M, 1] and [N, 1]. Accumulated in float32, to which
bias [N] is added.
Triton kernels (kernels/int8_mm.py) compute where they can, their torch twins (int8_twins) elsewhere.
Every function raises TurboError, before any launch, where type, shape or device of an operand does not fit.
"""

import functools
import importlib.util

import torch

from .. import dispatch
from ..dispatch import FLOATS, explained, learning, use_triton
from ..errors import TurboError, check_device, check_float, refuse
from . import reference
from .quantize import (
    BLOCK,
    _kernel_quantizes,
    _quantize_block,
    _quantize_rows,
    block_scale_shape,
    check_scale,
    is_row_scale,
)
from .reference import multiplier, slice_rows


def _check_int8(name, what, q, scale, k, device):
    if q.dtype != torch.int8 or q.ndim != 2 or (k is not None and q.shape[1] != k):
        refuse(name, what, f"int8 [rows, {'K' if k is None else k}]", f"{q.dtype} {list(q.shape)}")
    if scale.dtype != torch.float32 or scale.ndim != 2:
        refuse(name, f"the scale of {what}", "a float32 matrix", f"{scale.dtype} {list(scale.shape)}")
    check_scale(q, scale, f"{name}, {what}")
    check_device(name, f"the scale of {what}", scale, device)
    check_device(name, what, q, device)


def _check(name, x_q, x_scale, w_q, w_scale, bias):
    device = x_q.device
    _check_int8(name, "x", x_q, x_scale, None, device)
    _check_int8(name, "the weight", w_q, w_scale, x_q.shape[1], device)
    (m, k), n = x_q.shape, w_q.shape[0]
    shapes = [(x_scale, (m, 1), block_scale_shape(m, k)), (w_scale, (n, 1), block_scale_shape(n, k))]
    # where K <= 128 and a matrix has one row, its scale belongs to both formats
    if not any(all(tuple(s.shape) == pair[i] for s, *pair in shapes) for i in range(2)):
        got = f"{list(x_scale.shape)} and {list(w_scale.shape)}"
        refuse(name, "the scales of x and the weight", "in one format, both block or both row", got)
    if bias is not None:
        check_float(name, "bias", bias, (n,), device)


def _check_out(name, dtype):
    if dtype not in FLOATS:
        refuse(name, "out_dtype", "bfloat16, float16 or float32", dtype)


def int8_mm(x_q, x_scale, w_q, w_scale, bias=None, out_dtype=torch.bfloat16, gelu=False):
    """x w^T + bias, after GELU (tanh form) where asked. Returns [M, N] in out_dtype."""
    _check("int8_mm", x_q, x_scale, w_q, w_scale, bias)
    _check_out("int8_mm", out_dtype)
    run = torch.ops.turbowan.int8_mm if torch.compiler.is_compiling() else _int8_mm
    return run(x_q, x_scale, w_q, w_scale, bias, out_dtype, gelu)


def int8_mm_quantize(x_q, x_scale, w_q, w_scale, bias=None, gelu=True):
    """The same, quantized from float32 in the block format: (int8 [M, N], float32 [ceil(M/128), ceil(N/128)]).

    The operands are in the block format too.
    """
    name = "int8_mm_quantize"
    _check(name, x_q, x_scale, w_q, w_scale, bias)
    if tuple(x_scale.shape) != block_scale_shape(*x_q.shape) or tuple(w_scale.shape) != block_scale_shape(*w_q.shape):
        refuse(name, "the scale of x", f"{list(block_scale_shape(*x_q.shape))} (block format)", list(x_scale.shape))
    run = torch.ops.turbowan.int8_mm_quantize if torch.compiler.is_compiling() else _int8_mm_quantize
    return run(x_q, x_scale, w_q, w_scale, bias, gelu)


def int8_mm_residual(x_q, x_scale, w_q, w_scale, bias, residual, gate=None, stats=True):
    """residual + gate * (x w^T + bias), computed in float32, and the row statistics that the next LayerNorm needs.

    residual: float [M, N]. gate: float32 [G, N], one row for each M/G consecutive rows, or None for 1.
    Returns (y [M, N] in residual's dtype, float32 [ceil(N/128), M, 2] or None without stats): mean and sum of squared
    deviations, of y as it is stored, over each span of 128 columns.
    """
    name = "int8_mm_residual"
    _check(name, x_q, x_scale, w_q, w_scale, bias)
    m, n = x_q.shape[0], w_q.shape[0]
    check_float(name, "residual", residual, (m, n), x_q.device)
    _check_out(name, residual.dtype)
    if gate is not None:
        check_float(name, "gate", gate, (len(gate) if gate.ndim else 1, n), x_q.device, torch.float32)
        if len(gate) == 0 or m % len(gate):
            refuse(name, "the number of rows of x", f"a multiple of the {len(gate)} rows of the gate", m)
    run = torch.ops.turbowan.int8_mm_residual if torch.compiler.is_compiling() else _int8_mm_residual
    y, sums = run(x_q, x_scale, w_q, w_scale, bias, residual, gate, stats)
    return y, sums if stats else None


def int8_mm_qkv(x_q, x_scale, weights, scales, biases=None, out_dtype=torch.bfloat16):
    """Three products of one x, for q, k and v, and what RMSNorm of q and k over their full width needs.

    weights: three int8 [N, K]. scales: theirs. biases: three [N], or None.
    Returns (y [3, M, N] in out_dtype, float32 [2, ceil(N/128), M]): sums of squares of each row of q and k, as they
    are stored, over each span of 128 columns.
    """
    name = "int8_mm_qkv"
    if len(weights) != 3 or len(scales) != 3 or (biases is not None and len(biases) != 3):
        count = f"{len(weights)}, {len(scales)} and {3 if biases is None else len(biases)}"
        refuse(name, "weights, scales and biases", "three each (q, k, v)", count)
    biases = None if biases is None or all(b is None for b in biases) else list(biases)
    for i, (w_q, w_scale) in enumerate(zip(weights, scales)):
        if w_q.shape != weights[0].shape or w_scale.shape != scales[0].shape:
            refuse(name, "the weights of q, k and v", "of one shape and format", [list(w.shape) for w in weights])
        if biases and biases[i] is None:
            refuse(name, "biases", "three tensors or None", "some of each")
        _check(name, x_q, x_scale, w_q, w_scale, biases and biases[i])
    _check_out(name, out_dtype)
    run = torch.ops.turbowan.int8_mm_qkv if torch.compiler.is_compiling() else _int8_mm_qkv
    return run(x_q, x_scale, list(weights), list(scales), biases or [], out_dtype)


def _by_kernels(x_q, *tensors):
    return not learning(*tensors) and use_triton(x_q.device, "int8_mm")


@explained
def _int8_mm(x_q, x_scale, w_q, w_scale, bias, out_dtype, gelu):
    if _by_kernels(x_q, x_scale, w_scale, bias):
        from ..kernels.int8_mm import int8_mm as run
    else:
        run = reference.int8_mm
    return run(*_contiguous(x_q, x_scale, w_q, w_scale, bias), out_dtype, gelu)


@explained
def _int8_mm_quantize(x_q, x_scale, w_q, w_scale, bias, gelu):
    if _by_kernels(x_q, x_scale, w_scale, bias):
        from ..kernels.int8_mm import int8_mm_quantize as run
    else:
        run = reference.int8_mm_quantize
    return run(*_contiguous(x_q, x_scale, w_q, w_scale, bias), gelu)


@explained
def _int8_mm_residual(x_q, x_scale, w_q, w_scale, bias, residual, gate, stats):
    if _by_kernels(x_q, x_scale, w_scale, bias, residual, gate):
        from ..kernels.int8_mm import int8_mm_residual as run
    else:
        run = reference.int8_mm_residual
    y, sums = run(*_contiguous(x_q, x_scale, w_q, w_scale, bias, residual, gate), stats)
    return y, x_scale.new_empty(0) if sums is None else sums  # an operator returns tensors only


@explained
def _int8_mm_qkv(x_q, x_scale, weights, scales, biases, out_dtype):
    if _by_kernels(x_q, x_scale, *scales, *biases):
        from ..kernels.int8_mm import int8_mm_qkv as run
    else:
        run = reference.int8_mm_qkv
    weights, scales, biases = (_contiguous(*tensors) for tensors in (weights, scales, biases))
    return run(*_contiguous(x_q, x_scale), weights, scales, biases or None, out_dtype)


def _contiguous(*tensors):
    return [t if t is None else t.contiguous() for t in tensors]


def _spans(n):
    return -(-n // BLOCK)


def _op(name, arguments, results, function, fake):
    op = torch.library.custom_op(f"turbowan::{name}", function, mutates_args=(), schema=f"({arguments}) -> {results}")
    op.register_fake(fake)


_OPERANDS = "Tensor x_q, Tensor x_scale, Tensor w_q, Tensor w_scale, Tensor? bias"
_op(
    "int8_mm",
    f"{_OPERANDS}, ScalarType out_dtype, bool gelu",
    "Tensor",
    _int8_mm,
    lambda x, xs, w, ws, bias, out_dtype, gelu: xs.new_empty(x.shape[0], w.shape[0], dtype=out_dtype),
)
_op(
    "int8_mm_quantize",
    f"{_OPERANDS}, bool gelu",
    "(Tensor, Tensor)",
    _int8_mm_quantize,
    lambda x, xs, w, ws, bias, gelu: (
        x.new_empty(x.shape[0], w.shape[0]),
        xs.new_empty(block_scale_shape(x.shape[0], w.shape[0])),
    ),
)
_op(
    "int8_mm_residual",
    f"{_OPERANDS}, Tensor residual, Tensor? gate, bool stats",
    "(Tensor, Tensor)",
    _int8_mm_residual,
    lambda x, xs, w, ws, bias, residual, gate, stats: (
        residual.new_empty(residual.shape),
        xs.new_empty((_spans(w.shape[0]), x.shape[0], 2) if stats else (0,)),
    ),
)
_op(
    "int8_mm_qkv",
    "Tensor x_q, Tensor x_scale, Tensor[] weights, Tensor[] scales, Tensor[] biases, ScalarType out_dtype",
    "(Tensor, Tensor)",
    _int8_mm_qkv,
    lambda x, xs, weights, scales, biases, out_dtype: (
        xs.new_empty(3, x.shape[0], weights[0].shape[0], dtype=out_dtype),
        xs.new_empty(2, _spans(weights[0].shape[0]), x.shape[0]),
    ),
)


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


@explained
def _linear(x, weight_q, weight_scale, bias):
    rows = is_row_scale(weight_q, weight_scale)
    if learning(x, weight_scale, bias):
        return _torch_linear(x, weight_q, weight_scale, bias, rows)
    if _kernel_quantizes(x) and dispatch.use_triton(x.device, "int8_mm"):
        from ..kernels.int8_mm import int8_mm

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


@functools.cache
def kitchen(device: torch.device):
    """comfy_kitchen where it is installed with a row-wise int8 linear of its own for this device, else None."""
    if device.type != "cuda" or importlib.util.find_spec("comfy_kitchen") is None:
        return None
    import comfy_kitchen

    backend = comfy_kitchen.list_backends().get("cuda", {})
    usable = backend.get("available") and not backend.get("disabled") and "int8_linear" in backend["capabilities"]
    return comfy_kitchen if usable else None
