"""The int8 linear by comfy_kitchen, where that has one for the row format and our kernels do not compute."""

import contextlib
import functools
import importlib.util

import torch


@functools.cache
def library(device: torch.device):
    """comfy_kitchen where it is installed with a row-wise int8 linear of its own for this device, else None."""
    if device.type != "cuda" or importlib.util.find_spec("comfy_kitchen") is None:
        return None
    import comfy_kitchen

    backend = comfy_kitchen.list_backends().get("cuda", {})
    usable = backend.get("available") and not backend.get("disabled") and "int8_linear" in backend["capabilities"]
    return comfy_kitchen if usable else None


def int8_linear(x, weight_q, weight_scale, bias=None):
    """Float [M, K] -> [M, N] in x's dtype; weights in the row format."""
    # the library launches on the current device, by the stream of the tensor's
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        return library(x.device).int8_linear(x, weight_q, weight_scale, bias, out_dtype=x.dtype)
