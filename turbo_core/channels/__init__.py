"""Norms over the channels of videos [B, C, T, H, W], between the convolutions of a VAE.

By the Triton kernel where it was proved (fast), in plain torch everywhere else (reference): float32 inside and one
rounding at the end, both. Layouts other than channels-last and tensors that learn are torch's own operations.
"""

import torch
import torch.nn.functional as F

from .paths import operations
from .reference import TINY

__all__ = ["norm_silu", "rms_norm"]


def rms_norm(x, gamma):
    """x / |x| * sqrt(C) * gamma over the channels of [B, C, ...], in float32 inside."""
    wide = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1, eps=TINY)
    return (wide * (gamma.float().view(1, -1, *[1] * (x.ndim - 2)) * x.shape[1] ** 0.5)).to(x.dtype)


def norm_silu(x, gamma, out):
    """SiLU(rms_norm(x, gamma)) into out, which may be a part of a larger tensor."""
    packed = x.is_contiguous(memory_format=torch.channels_last_3d)
    if torch.is_grad_enabled() or x.dtype == torch.float64 or not packed:
        out.copy_(F.silu(rms_norm(x, gamma)))
        return
    run = operations(x.device)
    for video, place in zip(x, out):
        rows, places = (t.permute(1, 2, 3, 0).view(-1, x.shape[1]) for t in (video, place))
        run.norm_silu(rows, gamma.flatten(), places)
