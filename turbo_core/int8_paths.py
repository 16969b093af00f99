"""Which code computes an int8 linear on a device, and why."""

import functools
import importlib.util

import torch

from . import paths
from .devices import has_int_mm, int_mm_pays


@functools.cache
def kitchen(device: torch.device):
    """comfy_kitchen where it is installed with a row-wise int8 linear of its own for this device, else None."""
    if device.type != "cuda" or importlib.util.find_spec("comfy_kitchen") is None:
        return None
    import comfy_kitchen

    backend = comfy_kitchen.list_backends().get("cuda", {})
    usable = backend.get("available") and not backend.get("disabled") and "int8_linear" in backend["capabilities"]
    return comfy_kitchen if usable else None


def int8_path(device, format: str) -> str:
    """Which path int8_linear takes on a device for "block" or "row" weights, and why, in words (turbo-core doctor)."""
    device = torch.device(device)
    reason = paths.why_not(device, "quantize") or paths.why_not(device, "int8_mm")
    if reason is None:
        return "Triton kernels"
    if device.type == "cpu":
        if int_mm_pays(device):
            return "torch._int_mm (exact int32)"
        return "float32 products: this CPU multiplies those faster than int8"
    if format == "row" and kitchen(device):
        return f"comfy_kitchen's int8 linear; {reason}"
    if format == "row" and has_int_mm(device):
        return f"torch._int_mm; {reason}"
    return f"float products in torch, which save memory but no time; {reason}"
