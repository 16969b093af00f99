"""The W8A8 linear: activations quantized on the fly in the weight's own format."""

import functools
import importlib.util

import torch

from ..dispatch import FLOATS, explained, learning
from ..errors import TurboError, check_device, check_float, refuse
from . import reference
from .formats import check_scale, is_row_scale
from .paths import operations


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
    operands = x.reshape(-1, x.shape[-1]), weight_q, weight_scale.float(), bias
    with explained():
        y = (_by_kitchen if _takes_kitchen(*operands) else _operations(*operands).int8_linear)(*operands)
    return y.view(*x.shape[:-1], n)


def _operations(x, weight_q, weight_scale, bias):
    return operations(x.device, ("quantize", "int8_mm"), x, weight_scale, bias) if x.dtype in FLOATS else reference


def _takes_kitchen(x, weight_q, weight_scale, bias) -> bool:
    """True where comfy_kitchen has a row-wise linear of its own and our kernels do not compute."""
    if torch.compiler.is_compiling() or not kitchen(x.device) or not is_row_scale(weight_q, weight_scale):
        return False
    return (
        len(x) > 0
        and x.dtype in FLOATS
        and _operations(x, weight_q, weight_scale, bias) is reference
        and (not learning(x, weight_scale, bias))
    )


def _by_kitchen(x, weight_q, weight_scale, bias):
    return kitchen(x.device).int8_linear(x, weight_q, weight_scale, bias, out_dtype=x.dtype)


@functools.cache
def kitchen(device: torch.device):
    """comfy_kitchen where it is installed with a row-wise int8 linear of its own for this device, else None."""
    if device.type != "cuda" or importlib.util.find_spec("comfy_kitchen") is None:
        return None
    import comfy_kitchen

    backend = comfy_kitchen.list_backends().get("cuda", {})
    usable = backend.get("available") and not backend.get("disabled") and "int8_linear" in backend["capabilities"]
    return comfy_kitchen if usable else None
