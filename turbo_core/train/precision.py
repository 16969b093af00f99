"""bfloat16 for training where the device multiplies it, float32 where it would be emulated."""

import functools

import torch


def autocast(device) -> torch.autocast:
    """torch.autocast to bfloat16 on this device, which does nothing where bfloat16 is slow, see has_bfloat16.

    Without its cache: torch before 2.11 gives copies of the weights that were made without gradients to operations
    that need them, and sharded weights would be held whole.
    """
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=has_bfloat16(kind), cache_enabled=False)


def dtype(device) -> torch.dtype:
    """bfloat16 where autocast would take it, else float32."""
    return torch.bfloat16 if has_bfloat16(torch.device(device).type) else torch.float32


def described(device) -> str:
    """What training on this device computes in, for a log."""
    kind = torch.device(device).type
    if has_bfloat16(kind):
        return "training in bfloat16"
    return f"training in float32: this {'CPU' if kind == 'cpu' else 'card'} has no bfloat16"


def conv_layout(video: torch.Tensor) -> torch.Tensor:
    """A video [B, C, T, H, W] in the memory layout in which the device's convolutions are fast under autocast."""
    fast = has_bfloat16(video.device.type)
    return video.contiguous(memory_format=torch.channels_last_3d if fast else torch.contiguous_format)


@functools.cache
def has_bfloat16(kind: str) -> bool:
    """False for cards before Ampere, and for a CPU for which oneDNN has no bfloat16 kernels (x86 before AVX-512):
    torch's own loops take their place, 7 times slower than float32 for the transformer and 60 times for the VAE."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
