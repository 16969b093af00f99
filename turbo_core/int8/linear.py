"""The W8A8 linear: activations quantized on the fly in the weight's own format."""

import torch

from ..dispatch import FLOATS, explained, learning
from ..errors import TurboError, check_device, check_float, refuse
from . import reference
from .formats import check_scale, dequantize, is_row_scale
from .paths import operations

FAMILIES = ("quantize", "int8_mm")


def int8_linear(x, weight_q, weight_scale, bias=None):
    """x @ dequantize(weight).T + bias with x quantized on the fly in the weight's own format.

    x: float [..., K]; all leading axes count as rows, so in the block format 128 consecutive tokens share a scale.
    weight_q: int8 [N, K]. weight_scale: float [ceil(N/128), ceil(K/128)] or [N, 1]. bias: float [N] or None.
    Returns [..., N] in x's dtype; accumulated in float32. x and bias may learn: their gradient is that of the product
    with the dequantized weight, rounding x counts as no change. Raises TurboError, before any launch, where type, shape
    or device of an operand does not fit, or the scale is to learn.
    """
    name = "int8_linear"
    if weight_q.dtype != torch.int8 or weight_q.ndim != 2:
        raise TurboError(f"int8_linear: weight must be int8 [N, K], got {weight_q.dtype} {list(weight_q.shape)}")
    if x.shape[-1] != weight_q.shape[1]:
        raise TurboError(f"int8_linear: x has {x.shape[-1]} channels, the weight {weight_q.shape[1]}")
    check_scale(weight_q, weight_scale, name)
    n = weight_q.shape[0]
    if not x.is_floating_point():
        raise TurboError(f"int8_linear: x must be float, got {x.dtype}")
    if not weight_scale.is_floating_point():
        refuse(name, "the scale of the weight", "float", weight_scale.dtype)
    check_device(name, "the weight", weight_q, x.device)
    check_device(name, "the scale of the weight", weight_scale, x.device)
    if bias is not None:
        check_float(name, "bias", bias, (n,), x.device)
    matrix, scale = x.reshape(-1, x.shape[-1]), weight_scale.float()
    if learning(scale):
        raise TurboError("int8_linear: the scale of the weight has no gradient. Train on the unquantized weight.")
    with explained():
        if _forward_mode():
            run = _StraightBothWays.apply
        elif learning(matrix, bias):
            run = _Straight.apply
        else:
            run = _way(matrix, weight_q, scale)
        return run(matrix, weight_q, scale, bias).view(*x.shape[:-1], n)


def _forward_mode() -> bool:
    """True within torch.func.jvp and torch.autograd.forward_ad: what has a tangent does not say that it learns."""
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0


def _way(x, weight_q, scale):
    """The function that computes the product of these, without a gradient."""
    rows = len(x) > 0 and is_row_scale(weight_q, scale)
    run = operations(x.device, FAMILIES, rows=rows) if x.dtype in FLOATS else reference
    return run.int8_linear


class _Straight(torch.autograd.Function):
    """The product with a gradient that goes straight through the rounding of x, which has none of its own."""

    @staticmethod
    def forward(x, weight_q, scale, bias):
        return _way(x, weight_q, scale)(x, weight_q, scale, bias)

    @staticmethod
    def setup_context(ctx, given, _):
        x, weight_q, scale, _ = given
        ctx.rows = len(x)
        ctx.save_for_backward(weight_q, scale)
        ctx.save_for_forward(weight_q, scale)

    @staticmethod
    def backward(ctx, gradient):
        of_x, _, _, of_bias = ctx.needs_input_grad
        weight = dequantize(*ctx.saved_tensors, gradient.dtype) if of_x else None
        return gradient @ weight if of_x else None, None, None, gradient.sum(0) if of_bias else None


class _StraightBothWays(_Straight):
    """The same with a derivative in forward mode, which torch.compile traces no function with."""

    @staticmethod
    def jvp(ctx, of_x, _, __, of_bias):
        if of_x is None:
            return of_bias.expand(ctx.rows, -1)
        moved = of_x @ dequantize(*ctx.saved_tensors, of_x.dtype).t()
        return moved if of_bias is None else moved + of_bias
