"""The 128x128-block int8 format as a comfy_kitchen QuantizedLayout.

Needs comfy_kitchen, not ComfyUI. A weight in this layout moves, clones, saves and takes LoRA like any tensor that
the host knows; its linear, mm and addmm go through turbo_core.int8.int8_linear.
"""

import dataclasses
from dataclasses import dataclass

import torch
from comfy_kitchen.tensor import QuantizedLayout, QuantizedTensor, register_layout_class, register_layout_op
from comfy_kitchen.tensor.base import BaseLayoutParams, dequantize_args

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


register_layout_class(NAME, TurboBlockInt8Layout)


def wrap(weight_q, scale, dtype):
    """int8 [N, K] and its block scale as a QuantizedTensor that presents itself as `dtype`."""
    params = TurboBlockInt8Layout.Params(scale=scale, orig_dtype=dtype, orig_shape=tuple(weight_q.shape))
    return QuantizedTensor(weight_q.contiguous(), NAME, params)  # as the kernels read it


def is_block(tensor) -> bool:
    """True for an untransposed weight in this layout."""
    return isinstance(tensor, QuantizedTensor) and tensor._layout_cls == NAME and not tensor._params.transposed


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
