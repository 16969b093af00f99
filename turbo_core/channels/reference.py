"""RMSNorm over channels and SiLU in plain torch: the oracle of the kernel, and what computes without it."""

import torch
import torch.nn.functional as F

TINY = 1e-12  # the least length that a vector is divided by
_SLICE = {"cpu": 2**18}  # numbers that are worked on at a time: their float32 copies stay in a CPU's cache
_LARGE_SLICE = 2**23


def norm_silu(x, gamma, out=None):
    """SiLU(x / |x| * sqrt(C) * gamma) of each row of x [M, C], computed in float32, in out's dtype.

    gamma: [C]. out: [M, C] to write to, default a new one in x's dtype. Returns out.
    """
    channels = x.shape[1]
    factors = gamma.float() * channels**0.5
    out = torch.empty_like(x) if out is None else out
    slice_rows = max(1, _SLICE.get(x.device.type, _LARGE_SLICE) // channels)
    for some, there in zip(x.split(slice_rows), out.split(slice_rows)):
        length = torch.linalg.vector_norm(some, dim=1, keepdim=True, dtype=torch.float32)
        wide = (some * length.clamp_min_(TINY).reciprocal_()).mul_(factors)
        if there.dtype == torch.float32:
            torch.ops.aten.silu.out(wide, out=there)
        else:
            there.copy_(F.silu(wide, inplace=True))
    return out
