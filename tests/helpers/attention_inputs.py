"""Inputs of sparse-linear attention, and the forms of them that the kernels hand to each other, made in torch."""

import torch
import torch.nn.functional as F

from tests.helpers import oracles
from tests.helpers.tensors import gaussian
from turbo_core.sla import reference
from turbo_core.sla.blocks import in_blocks

BLOCK_Q, BLOCK_K = 128, 64
EPS = 1e-6
# (L, B, H, D, layout): one token; around one key block; one query block less some; a ragged fourth key block; more
SHAPES = [(1, 1, 1, 64, "planes"), (63, 2, 3, 64, "interleaved"), (64, 1, 2, 128, "planes"), (65, 1, 1, 128, "planes")]
SHAPES += [(120, 2, 1, 64, "planes"), (200, 1, 2, 128, "interleaved"), (720, 1, 1, 64, "interleaved")]


def draw(length, keys=None, b=1, h=2, d=64, dtype=torch.float32, layout="planes", seed=0):
    """q, k, v [B, L, H, D] as models have them: a slow drift, peaked rows, outlier channels, a common key offset.

    layout "interleaved": views of one [B, L, 3, H, D], as one projection to q, k and v leaves them.
    """
    generator = torch.Generator().manual_seed(seed)
    keys = keys or length
    q, k, v = (torch.randn(b, n, h, d, generator=generator) for n in (length, keys, keys))
    k = 0.5 * k + torch.linspace(-2, 2, keys)[:, None, None] * torch.randn(1, 1, h, d, generator=generator)
    q, v = q * torch.linspace(0.3, 1.5, h)[:, None], v + 0.5
    q[:, ::7] *= 3  # rows that look at few keys
    q[..., 3] *= 4
    k[..., 5] *= 4
    k += 8 * torch.randn(1, 1, h, d, generator=generator)
    v[..., ::5] *= 20
    q, k, v = (x.to(dtype) for x in (q, k, v))
    return torch.stack([q, k, v], 2).unbind(2) if layout == "interleaved" else (q, k, v)


def projection(d, seed=9):
    """Weight and bias of proj_l."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d, d, generator=generator) / d**0.5, torch.randn(d, generator=generator)


def some_map(b, h, length, keys, kept=2, seed=5):
    """A different ascending choice of key blocks for every head and query block; every other row keeps the last."""
    blocks, rows = -(-keys // BLOCK_K), -(-length // BLOCK_Q)
    score = torch.rand(b, h, rows, blocks, generator=torch.Generator().manual_seed(seed))
    score[:, :, ::2, -1] = 2
    return score.topk(min(kept, blocks), -1).indices.sort(-1).values.to(torch.int32)


def raw_form(q, k, partials=3, seed=2, eps=EPS):
    """What norms and rotates q and k on load, (sums, q_weight, k_weight, eps, cos, sin), and the q and k that come of
    it, in float64. sums: [2, partials, B * L]."""
    length, h, d = q.shape[1:]
    weights = [1 + 0.2 * gaussian(h * d, seed=seed + i) for i in range(2)]
    angles = 6 * torch.rand(length, d // 2, generator=torch.Generator().manual_seed(seed))
    parts = [torch.tensor_split(x.double().flatten(2).flatten(0, 1), partials, 1) for x in (q, k)]
    sums = torch.stack([torch.stack([part.square().sum(1) for part in of]) for of in parts]).float()
    ready = [
        oracles.rotated(oracles.rms_norm(x.flatten(2), weight, eps).view(x.shape), angles)
        for x, weight in zip((q, k), weights)
    ]
    return (sums, *weights, eps, angles.cos(), angles.sin()), ready


def low_bit(k, v, fp8):
    """k, v [B, L, H, D] -> what the preparation gives the kernel, and the values that they stand for."""
    b, keys, h, d = k.shape
    blocks = in_blocks(k.float() - k.float().mean(1, keepdim=True), BLOCK_K)
    k_scale = blocks.abs().amax((2, 3)).clamp_min(1e-8) / 127
    k_q = (blocks / k_scale[..., None, None]).round()
    k_q = k_q.view(b, h, -1, d)[:, :, :keys]
    v = v.float().transpose(1, 2)
    v_scale = v.abs().amax(2).clamp_min(1e-8) / (448 if fp8 else 16384)
    v_q = v / v_scale[:, :, None]
    values = v_q.to(torch.float8_e4m3fn if fp8 else torch.float16)
    exact = values.float() * v_scale[:, :, None]
    if fp8:
        padded = F.pad(v_q, (0, 0, 0, -keys % BLOCK_K)).transpose(2, 3).contiguous()
        values = padded.to(torch.float8_e4m3fn)
    k_scale = k_scale.view(b, h, -1)
    dequantized = k_q * k_scale.repeat_interleave(BLOCK_K, 2)[:, :, :keys, None]
    given = {"k": k_q.to(torch.int8).contiguous(), "v": values, "k_scale": k_scale, "v_scale": v_scale.contiguous()}
    return given, (dequantized.transpose(1, 2), exact.transpose(1, 2))


def int8_blocks(q):
    """q [B, L, H, D] rounded to int8 with one scale for 128 queries of a head, and back."""
    b, length, h, d = q.shape
    blocks = reference._fake_int8(in_blocks(q.float(), BLOCK_Q))
    return blocks.view(b, h, -1, d)[:, :, :length].transpose(1, 2)


def linear_sums(k, v, weight, bias):
    """kv_proj, k_sum and proj_bias as the kernel takes them."""
    ck = k.double().transpose(1, 2).softmax(-1)
    kv = ck.transpose(-1, -2) @ v.double().transpose(1, 2) @ weight.double().t()
    return {"kv_proj": kv.float(), "k_sum": ck.sum(2).float(), "proj_bias": bias}
