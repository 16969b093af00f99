"""Convolutions and norms over videos [B, C, T, H, W], fastest where channels lie innermost in memory."""

import functools
import platform

import torch
import torch.nn.functional as F

from . import winograd

_SLICE = {"cpu": 2**18}  # numbers of a slice that a norm works on: its float32 copies stay in a CPU's cache
_LARGE_SLICE = 2**23
_TINY = 1e-12  # the least length that a vector is divided by


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


def rms_norm(x, gamma):
    """x / |x| * sqrt(C) * gamma over the channels of [B, C, ...], in float32 inside."""
    wide = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1, eps=_TINY)
    return (wide * (gamma.float().view(1, -1, *[1] * (x.ndim - 2)) * x.shape[1] ** 0.5)).to(x.dtype)


def norm_silu(x, gamma, out):
    """SiLU(rms_norm(x, gamma)) into out, which may be a part of a larger tensor."""
    if torch.is_grad_enabled() or x.dtype == torch.float64 or not x.is_contiguous(memory_format=torch.channels_last_3d):
        out.copy_(F.silu(rms_norm(x, gamma)))
        return
    channels = x.shape[1]
    factors = gamma.float().flatten() * channels**0.5
    slice_rows = max(1, _SLICE.get(x.device.type, _LARGE_SLICE) // channels)
    for video, place in zip(x, out):
        rows, places = (t.permute(1, 2, 3, 0).view(-1, channels) for t in (video, place))
        for some, there in zip(rows.split(slice_rows), places.split(slice_rows)):
            length = torch.linalg.vector_norm(some, dim=1, keepdim=True, dtype=torch.float32)
            wide = (some * length.clamp_min_(_TINY).reciprocal_()).mul_(factors)
            if there.dtype == torch.float32:
                torch.ops.aten.silu.out(wide, out=there)
            else:
                there.copy_(F.silu(wide, inplace=True))
