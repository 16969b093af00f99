"""Inputs of the attention kernel, made with plain torch, and what float64 makes of them."""

import torch
import torch.nn.functional as F
from turbo_core.kernels.sla_attention import BLOCK_K, BLOCK_Q

from turbo_core.sla import reference
from turbo_core.sla.blocks import in_blocks

EPS = 1e-6


def draw(length, keys=None, b=1, h=2, d=64, dtype=torch.float32, seed=0):
    """q, k, v [B, L, H, D] as models have them: a slow drift, peaked rows, outlier channels, a common key offset."""
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
    return [x.to(dtype) for x in (q, k, v)]


def projection(d, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d, d, generator=generator) / d**0.5, torch.randn(d, generator=generator)


def some_map(b, h, length, keys, kept=2, seed=5):
    """A different ascending choice of key blocks for every head and query block; every other row keeps the last."""
    blocks, rows = -(-keys // BLOCK_K), -(-length // BLOCK_Q)
    score = torch.rand(b, h, rows, blocks, generator=torch.Generator().manual_seed(seed))
    score[:, :, ::2, -1] = 2
    return score.topk(min(kept, blocks), -1).indices.sort(-1).values.to(torch.int32)


def raw_form(q, seed=2):
    """(sums [2, 3, B * L], q_weight, cos, sin) of a q that is yet to be normed and roped, and that q afterwards."""
    length, h, d = q.shape[1:]
    generator = torch.Generator().manual_seed(seed)
    weight = 1 + 0.2 * torch.randn(h * d, generator=generator)
    angles = 6 * torch.rand(length, d // 2, generator=generator)
    parts = torch.tensor_split(q.float().flatten(2).flatten(0, 1), 3, 1)
    sums = torch.stack([part.square().sum(1) for part in parts])
    cos, sin = angles.cos(), angles.sin()
    ready = reference.normed(q.float(), sums, weight, EPS, cos, sin)
    return {"sums": torch.stack([sums, sums + 9]), "q_weight": weight, "eps": EPS, "cos": cos, "sin": sin}, ready


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


def attend64(q, k, v, index=None, counts=None):
    """Softmax attention under the mask that the map stands for, in float64: [B, L, H, D]."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    score = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if index is not None:
        blocks = torch.zeros(*index.shape[:3], -(-k.shape[2] // BLOCK_K), dtype=torch.bool)
        for row in torch.cartesian_prod(*(torch.arange(n) for n in index.shape[:3])).tolist():
            blocks[tuple(row)][index[tuple(row)][: None if counts is None else counts[tuple(row)]].long()] = True
        mask = blocks.repeat_interleave(BLOCK_Q, 2)[:, :, : q.shape[2]].repeat_interleave(BLOCK_K, 3)
        score = score.masked_fill(~mask[..., : k.shape[2]], -torch.inf)
    return (score.softmax(-1) @ v).transpose(1, 2)


def linear64(q, k, v, weight, bias):
    """The published linear branch in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    cq, ck = q.softmax(-1), k.softmax(-1)
    out = cq @ (ck.transpose(-1, -2) @ v) / (1e-5 + (cq * ck.sum(2, keepdim=True)).sum(-1, keepdim=True))
    return (out @ weight.double().T + bias.double()).transpose(1, 2)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
