"""Layers of Wan's transformer: matrices compute in their own dtype, norms and the head in float32, as the reference has
it; a slice of tokens at a time, so that their float32 copies stay small beside them."""

import torch
import torch.nn.functional as F
from torch import nn

from ..dispatch import FLOATS, explained, learning, use_triton
from ..int8 import int8_linear, operations
from ..int8.products import has_cache
from ..rope import rotate

SLICE = 1 << 24  # elements computed in float32 at a time: one copy of the tokens is 1.5 GB at 14B and 720p
BITE = 1 << 20  # the same for each thread of a CPU, whose cache they stay in


def token_slices(x):
    """Slices of the tokens of x [B, L, ...], whole int8 blocks of 128 of them."""
    # a compiler fuses what a slice would keep near, and unrolls slices
    small = has_cache(x.device) and not torch.compiler.is_compiling()
    elements = BITE * torch.get_num_threads() if small else SLICE
    step = max(1, elements * x.shape[1] // x.numel() // 128) * 128
    return [slice(start, start + step) for start in range(0, x.shape[1], step)]


def by_slices(function, x):
    """function(x [B, L, C]) -> [B, L, ...], computed slice by slice: tokens must not see each other in it."""
    out = None
    for part in token_slices(x):
        y = function(x[:, part])
        if y.shape[1] == x.shape[1]:
            return y
        out = y.new_empty(*x.shape[:2], *y.shape[2:]) if out is None else out
        out[:, part] = y
    return out


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 with block or row scales, see turbo_core.int8.

    beside: pairs of float matrices (down [R, K], up [N, R] or None) whose product with x is added, see turbo_core.lora.
    """

    def __init__(self, weight, weight_scale, bias=None):
        super().__init__()
        self.register_buffer("weight", weight.contiguous())  # as the kernels read them
        self.register_buffer("weight_scale", weight_scale.contiguous())
        self.register_buffer("bias", bias)
        self.beside = ()

    def forward(self, x):
        y = int8_linear(x, self.weight, self.weight_scale, self.bias)
        for down, up in self.beside:
            inner = F.linear(x, down.to(x.dtype))
            y += inner if up is None else F.linear(inner, up.to(x.dtype))
        return y


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        if use_triton(x.device, "norm") and x.dtype in FLOATS and not learning(x, self.weight):
            with explained():
                rows = x.reshape(-1, x.shape[-1])
                return operations(x.device, ("norm",)).rms_norm(rows, self.weight, self.eps).view(x.shape)
        weight = self.weight.float()
        return by_slices(lambda x: F.rms_norm(x.float(), weight.shape, weight, self.eps).to(x.dtype), x)


def new_modulation(parts: int, dim: int) -> nn.Parameter:
    """[1, parts, dim], normal with a variance of 1 / dim. Without numbers on the meta device: drawing them there takes
    torch's compiler in, which is seconds."""
    values = torch.empty(1, parts, dim)
    return nn.Parameter(values if values.is_meta else values.normal_() / dim**0.5)


def layer_norm(x, eps, weight=None, bias=None):
    """LayerNorm over the last axis, computed and returned in float32."""
    weight, bias = (None if p is None else p.float() for p in (weight, bias))
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)


def apply_rope(x, angles):
    """Rotate neighbouring channel pairs of x [B, L, H, D] by angles [L, D / 2], in float32."""
    out = torch.empty_like(x)
    for part in token_slices(x):
        out[:, part] = rotate(x[:, part], angles[part].cos()[:, None], angles[part].sin()[:, None])
    return out


def float_linear(layer, x):
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())
