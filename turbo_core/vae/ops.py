"""Convolutions over videos [B, C, T, H, W], fastest where channels lie innermost in memory."""

import functools
import platform

import torch
import torch.nn.functional as F

from . import winograd


def conv(x, weight, bias, stride=1, padding=0):
    """torch's conv2d or conv3d, but on an x86 CPU always oneDNN's: for a batch of one torch takes a loop of its own for
    small videos, which was up to six times slower. A wide one of 3x3x3 goes by winograd.py."""
    if not _has_onednn(x.device.type, x.dtype) or torch.is_grad_enabled():
        return (F.conv2d if x.ndim == 4 else F.conv3d)(x, weight, bias, stride, padding)
    if x.dtype == torch.float32 and stride == 1 and winograd.pays(x, weight):
        return winograd.conv(x, weight, bias, padding[1])
    stride, padding = (v if isinstance(v, tuple) else (v,) * (x.ndim - 2) for v in (stride, padding))
    return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1,) * (x.ndim - 2), 1)


@functools.cache
def _has_onednn(kind: str, dtype: torch.dtype) -> bool:
    if kind != "cpu" or platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
