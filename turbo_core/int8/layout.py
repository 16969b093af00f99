"""The 128x128-block int8 format as a comfy_kitchen QuantizedLayout.

Needs comfy_kitchen, not ComfyUI. A weight in this layout moves, clones, saves and takes LoRA like any tensor that
the host knows; its linear, mm and addmm go through turbo_core.int8.int8_linear.
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, register_layout_class, register_layout_op
from comfy_kitchen.tensor.base import BaseLayoutParams, dequantize_args

from ..dispatch import FLOATS
from .formats import dequantize_block
from .linear import int8_linear
from .quantize import quantize_block

NAME = "TurboBlockInt8Layout"
FORMAT = "int8_block128"  # the name in a file's comfy_quant entries


class TurboBlockInt8Layout(QuantizedLayout):
    """int8 [N, K] with a float32 scale [ceil(N/128), ceil(K/128)]; see turbo_core.int8.quantize_block."""

    @dataclass(frozen=True)
    class Params(BaseLayoutParams):
        transposed: bool = False

    @classmethod
    def quantize(cls, tensor, scale=None, stochastic_rounding=0, inplace_ops=False, **_):
        """Quantize a float matrix. The scale always comes from the data: None and "recalculate" mean the same."""
        if isinstance(scale, torch.Tensor):
            raise ValueError("the block format computes its scales from the weight; pass scale=None or 'recalculate'")
        qdata, block_scale = quantize_block(tensor, seed=stochastic_rounding or 0)
        return qdata, cls.Params(scale=block_scale, orig_dtype=tensor.dtype, orig_shape=tuple(tensor.shape))

    @classmethod
    def dequantize(cls, qdata, params):
        return dequantize_block(qdata, params.scale, params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor):
        return qtensor._qdata, qtensor._params.scale

    @classmethod
    def state_dict_tensors(cls, qdata, params):
        return {"": qdata, "_scale": params.scale}

    @classmethod
    def linear_input_act(
        cls, weight, x, bias=None, input_act=None, input_act_weight=None, input_act_eps=0.0, residual=None,
        residual_scale=None,
    ):  # fmt: skip
        """linear(act(x)), and residual + residual_scale * that where there is one, as comfy_kitchen asks a layout.

        NotImplemented for what is not computed here, and the host does it in steps. Operands stay as they are.
        """
        if not is_block(weight) or not _multiplies(x, weight, bias):
            return NotImplemented
        if not _adds((*x.shape[:-1], weight.shape[0]), x.device, residual, residual_scale):
            return NotImplemented
        x = activated(x, input_act, input_act_weight, input_act_eps)
        if x is NotImplemented:
            return NotImplemented
        return added(int8_linear(x, *cls.get_plain_tensors(weight), bias), residual, residual_scale)


register_layout_class(NAME, TurboBlockInt8Layout)


def wrap(weight_q, scale, dtype):
    """int8 [N, K] and its block scale as a QuantizedTensor that presents itself as `dtype`."""
    params = TurboBlockInt8Layout.Params(scale=scale, orig_dtype=dtype, orig_shape=tuple(weight_q.shape))
    return QuantizedTensor(weight_q.contiguous(), NAME, params)  # as the kernels read it


def is_block(tensor) -> bool:
    """True for an untransposed weight in this layout."""
    return isinstance(tensor, QuantizedTensor) and tensor._layout_cls == NAME and not tensor._params.transposed


def activated(x, name, weight=None, eps=0.0):
    """x through what the host calls gelu_tanh or rms_norm (weight [K] or None); NotImplemented for other names."""
    if name is None:
        return x
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "rms_norm" and (weight is None or (_is_float(weight) and weight.shape == x.shape[-1:])):
        return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.to(x), eps)
    return NotImplemented


def added(out, residual=None, scale=None):
    """residual + scale * out; without a residual out as it is, without a scale their sum."""
    if residual is None:
        return out
    return residual + out if scale is None else torch.addcmul(residual, out, scale)


def _is_float(tensor):
    return isinstance(tensor, torch.Tensor) and not isinstance(tensor, QuantizedTensor) and tensor.dtype in FLOATS


def _multiplies(x, weight, bias):
    """True where int8_linear takes these operands."""
    if not _is_float(x) or x.ndim == 0 or x.shape[-1] != weight.shape[1] or x.device != weight.device:
        return False
    return bias is None or (_is_float(bias) and bias.shape == weight.shape[:1] and bias.device == x.device)


def _adds(shape, device, residual, scale):
    """True where a product of this shape can be scaled and added without changing its shape."""
    given = [t for t in (residual, scale) if t is not None]
    if not all(_is_float(t) and t.device == device for t in given):
        return False
    try:
        return torch.broadcast_shapes(shape, *(t.shape for t in given)) == shape
    except RuntimeError:
        return False


def _product(x, weight, bias, fallback):
    """x @ W^T + bias when `weight` is W^T seen through a transpose of this layout, else fallback on floats."""
    if isinstance(weight, QuantizedTensor) and weight._layout_cls == NAME and weight._params.transposed:
        return int8_linear(dequantize_args(x), *TurboBlockInt8Layout.get_plain_tensors(weight), bias)
    return fallback()


@register_layout_op(torch.ops.aten.t.default, TurboBlockInt8Layout)
def _t(qt, args, kwargs):
    old = qt._params
    shape = (old.orig_shape[1], old.orig_shape[0])
    return QuantizedTensor(qt._qdata, NAME, dataclasses.replace(old, orig_shape=shape, transposed=not old.transposed))


@register_layout_op(torch.ops.aten.linear.default, TurboBlockInt8Layout)
def _linear(qt, args, kwargs):
    x, weight, bias = (*args, None)[:3]
    if is_block(weight):
        return int8_linear(dequantize_args(x), *TurboBlockInt8Layout.get_plain_tensors(weight), bias)
    return torch.nn.functional.linear(*dequantize_args(args))


@register_layout_op(torch.ops.aten.mm.default, TurboBlockInt8Layout)
def _mm(qt, args, kwargs):
    return _product(args[0], args[1], None, lambda: torch.mm(*dequantize_args(args)))


@register_layout_op(torch.ops.aten.addmm.default, TurboBlockInt8Layout)
def _addmm(qt, args, kwargs):
    bias, x, weight = args[:3]
    if kwargs:
        return torch.addmm(*dequantize_args(args), **dequantize_args(kwargs))
    return _product(x, weight, bias, lambda: torch.addmm(*dequantize_args(args)))
