"""The weights of a MODEL as it sees them, whatever the host has loaded or merged at the moment."""

import dataclasses

import comfy.float
import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from comfy.quant_ops import QuantizedTensor

from ...turbo_core.errors import TurboError
from .ops import ROW

PREFIX = "diffusion_model."  # of the names of the network's weights in a MODEL


def original_weight(patcher, key):
    """A weight without any LoRA, also while the host has one merged in."""
    backup = patcher.backup.get(key)
    return with_rows(comfy.utils.get_attr(patcher.model, key) if backup is None else backup.weight)


def with_rows(weight):
    """The same weight; where a file has the scales of its rows as [N], which the host multiplies by but dequantizes
    along the columns, they are [N, 1] from now on."""
    scale = weight._params.scale if isinstance(weight, QuantizedTensor) and weight._layout_cls == ROW else None
    if scale is not None and scale.shape == weight.shape[:1] != (1,):
        weight._params = dataclasses.replace(weight._params, scale=scale[:, None])
    return weight


def float_weight(patcher, key):
    """A weight with this MODEL's LoRAs added, on the compute device: float32 where there are any or it was quantized.

    Raises TurboError for weights that other packs keep in a format of their own.
    """
    weight, device = original_weight(patcher, key), comfy.model_management.get_torch_device()
    if isinstance(weight, QuantizedTensor):
        weight = weight.to(torch.float32).dequantize()
    elif not weight.dtype.is_floating_point:
        raise TurboError(
            f"{key} is kept as {weight.dtype} by the node that loaded it (GGUF and the like), which only that node "
            "reads: load the bf16, fp16 or fp8 version of this model."
        )
    elif weight.dtype.itemsize == 1:
        weight = weight.to(torch.float32)  # almost nothing is defined on fp8
    if key in patcher.patches:
        return comfy.lora.calculate_weight(patcher.patches[key], weight.to(device, torch.float32, copy=True), key)
    return weight.to(device)


def stored_weight(patcher, key):
    """A weight with this MODEL's LoRAs added, in the format that it is stored in, rounded as the host does it."""
    weight = original_weight(patcher, key)
    if key not in patcher.patches:
        return weight
    changed, seed = float_weight(patcher, key), comfy.utils.string_to_seed(key)
    if isinstance(weight, QuantizedTensor):
        return weight.requantize_from_float(changed, scale="recalculate", stochastic_rounding=seed)
    return comfy.float.stochastic_rounding(changed, weight.dtype, seed=seed)
