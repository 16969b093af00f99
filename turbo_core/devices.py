"""What a device has and has not, where torch does not tell before it fails."""

import functools

import torch


def widest_float(device) -> torch.dtype:
    """float64, or float32 on Apple GPUs, which have nothing wider."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


@functools.cache
def has_int_mm(device: torch.device) -> bool:
    """True where torch._int_mm runs: CPUs and NVIDIA cards from Turing (compute capability 7.5) on."""
    if device.type != "cuda":
        return device.type == "cpu"
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (7, 5)
