"""The linear branch of sparse-linear attention, brought into the range of a half-precision dot.

out = cq KV' / (1e-5 + cq . k_sum) + bias, with KV' = (ck^T v) proj^T. Row c of KV' over k_sum[c] is a mean of projected
values, and what cq leaves for it, w[c] = cq[c] k_sum[c] / (1e-5 + cq . k_sum), is between 0 and 1: out = w mean + bias
keeps in 16 bits what KV' and k_sum, which grow with the number of keys, would lose.
"""

import torch
import triton
import triton.language as tl

from .launch import run
from .rounding import magnitude

_LOG2E = tl.constexpr(1.4426950408889634)
_TINY = tl.constexpr(1e-30)
_LEAST = tl.constexpr(1e-20)  # of a matrix's largest magnitude: its inverse times a result stays finite
_WEIGHT_ONE = tl.constexpr(32768.0)  # stands for a weight of 1: small weights stay normal numbers of float16


@triton.jit
def linear_weights(x, k_sum):
    """w of the module's docstring times 32768: float32 [T, D]. x: float32 [T, D] normed and roped q; k_sum: [D]."""
    x = tl.exp2((x - tl.max(x, 1)[:, None]) * _LOG2E)
    floor = tl.sum(x, 1) * 1e-5  # softmax's own divisor goes out of the fraction
    x *= k_sum[None, :]
    return x * (1 / (floor + tl.sum(x, 1)) * _WEIGHT_ONE)[:, None]


@triton.jit
def _means_kernel(
    kv_ptr,  # [B * H, D, D]
    k_sum_ptr,  # [B * H, D]
    mean_ptr,  # [B * H, D, D]
    scale_ptr,  # [B * H]
    D: tl.constexpr,
):
    # one program owns the [D, D] matrix of one head
    plane = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    at = plane * D * D + d[:, None] * D + d[None, :]
    # a channel that no key has anything in: 0 / tiny = 0
    mean = tl.load(kv_ptr + at) / tl.maximum(tl.load(k_sum_ptr + plane * D + d), _TINY)[:, None]
    bits = tl.maximum(tl.max(magnitude(mean)), magnitude(tl.full((), _LEAST, tl.float32)))
    amax = bits.to(tl.float32, bitcast=True)
    tl.store(mean_ptr + at, (mean / amax).to(mean_ptr.dtype.element_ty))
    tl.store(scale_ptr + tl.program_id(0), amax / _WEIGHT_ONE)


def linear_means(kv_proj, k_sum, dtype=torch.float16):
    """Means of projected values, for linear_weights.

    kv_proj: float32 [B, H, D, D], (ck^T v) proj^T; k_sum: float32 [B, H, D]. Returns (mean [B, H, D, D] in dtype,
    largest magnitude 1; scale float32 [B, H]), with linear_weights @ mean * scale the linear branch without its bias.
    """
    b, h, d, _ = kv_proj.shape
    mean = torch.empty(kv_proj.shape, dtype=dtype, device=kv_proj.device)
    scale = torch.empty((b, h), dtype=torch.float32, device=kv_proj.device)
    run(_means_kernel, (b * h,), (kv_proj, k_sum, mean, scale), {"D": d, "num_warps": 8})
    return mean, scale
