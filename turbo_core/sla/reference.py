"""Sparse-linear attention in plain torch: the oracle of the kernels, and the path of every machine without them."""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..dispatch import learning
from ..int8 import quantize_block
from ..rope import rotate
from . import rows
from .blocks import covering_map, in_blocks, nan_unless_finite, top_map

KEPT = 1 << 30  # bytes of gathered keys and values that are kept for the gradient
GATHERED = 1 << 27  # bytes of gathered keys held at a time: memory stays linear in L whatever top-k is
SLICE = 1 << 25  # elements of q computed at a time: heads are independent, and their copies stay small beside q
BITE = 1 << 20  # the same on a CPU, in whose cache they stay
_FP8_MAX = 448.0


def _fake_int8(x):
    """Round [..., block, D] to int8 with one scale per block, and back."""
    scale = _block_scale(x)
    return _straight(x, (x.detach() / scale).round_().mul_(scale))


def _block_scale(x):
    return x.detach().abs().amax((-1, -2), keepdim=True).clamp_min(1e-8) / 127


def _int8(x):
    """[..., block, D] in int8, with a scale for each block [...]."""
    scale = _block_scale(x)
    return (x / scale).round_().to(torch.int8), scale[..., 0, 0]


def _fake_fp8(x, scale):
    return _straight(x, (x.detach() / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale)


def _straight(x, rounded):
    """What x was rounded to, with a gradient that goes straight to x: rounding has none of its own."""
    return rounded + (x - x.detach()) if learning(x) else rounded


def _attend_low_bit(q, k, v, mask, scale):
    """int8 values in q and k; the probabilities go through e4m3, scaled to its range, before they meet v."""
    score = (q @ k.transpose(-1, -2)) * scale
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    p = (score - score.amax(-1, keepdim=True)).exp_()
    return _fake_fp8(p, 1 / _FP8_MAX) @ v / p.sum(-1, keepdim=True)


def _attend(q, k, v, mask, scale):
    mask = None if mask is None else mask[:, None]
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], mask, scale=scale)[:, 0]


def sparse_attention(q, k, v, index, block_q: int = 128, block_k: int = 64, precision: str = "bf16", counts=None):
    """Softmax attention of each query block over its kept key blocks.

    q, k, v: [B, L, H, D]; index: int32 [B, H, q blocks, kept], as from block_map; counts: int32 [B, H, q blocks], how
    many of a row's blocks count, the last of them repeated behind (covering_map), or None for all. precision "bf16"
    computes in the input's dtype; "int8" rounds q and the mean-free k to int8 per block, and v (per channel) and the
    probabilities to fp8 e4m3, in float32. Returns [B, L, H, D]. Never builds anything of size L x L.
    """
    b, length, h, d = q.shape
    keys, dtype = k.shape[1], q.dtype
    by_rows = _has_cache(q.device) and not learning(q, k, v) and not torch.compiler.is_compiling()
    attend = _attend
    if precision == "int8":
        q, k, v = q.float(), k.float(), v.float()
        # the mean of all keys and the scale of all values leave bad ones out: those stay in their own block
        k = k - nan_unless_finite(k).nanmean(1, keepdim=True)
        v_amax = v.detach().abs().nan_to_num_(nan=0.0, posinf=0.0).amax(1, keepdim=True)
        v = _fake_fp8(nan_unless_finite(v), v_amax.clamp_min(1e-8) / _FP8_MAX)  # the cast makes 448 of infinity
        attend = _attend_low_bit
    qb, kb, vb = in_blocks(q, block_q), in_blocks(k, block_k), in_blocks(v, block_k)
    index = index.reshape(b * h, qb.shape[1], -1).long()
    if by_rows:
        index = index.sort(-1).values
        given = vb, index, rows.lengths_of(index, counts, keys, block_k), d**-0.5
        if precision == "int8":
            (q8, q_scale), (k8, k_scale) = _int8(qb), _int8(kb)
            out = rows.attend_low_bit(q8, q_scale, k8, k_scale, *given)
        else:
            out = rows.attend(qb, kb, *given)
        return out.view(b, h, -1, d)[:, :, :length].transpose(1, 2).to(dtype)
    if precision == "int8":
        qb, kb = _fake_int8(qb), _fake_int8(kb)
    kept = index.shape[-1]
    counts = None if counts is None else counts.reshape(b * h, -1, 1)
    batch = torch.arange(b * h, device=q.device)[:, None, None]
    out = torch.empty_like(qb)
    row = b * h * kept * block_k * d * kb.element_size()  # bytes of what one query block gathers of k, or of v
    step = max(1, GATHERED // row)
    # what is gathered is kept for the gradient: of a video's tokens tens of gigabytes, so it is gathered twice there
    again = learning(q, k, v) and 2 * row * qb.shape[1] > KEPT

    def gather(part, kb, vb, chosen, mask):
        gathered = (x[batch, chosen].reshape(-1, kept * block_k, d) for x in (kb, vb))
        return attend(part.reshape(-1, block_q, d), *gathered, mask, d**-0.5).view_as(part)

    for start in range(0, qb.shape[1], step):
        some = slice(start, start + step)
        chosen = index[:, some]
        mask = None
        if keys % block_k:
            mask = chosen[..., None] * block_k + torch.arange(block_k, device=q.device) < keys
        if counts is not None:
            there = (torch.arange(kept, device=q.device) < counts[:, some])[..., None].expand(-1, -1, -1, block_k)
            mask = there if mask is None else mask & there
        if mask is not None:
            mask = mask.reshape(-1, 1, kept * block_k)
        given = qb[:, some], kb, vb, chosen, mask
        if again:
            out[:, some] = checkpoint(gather, *given, use_reentrant=False, preserve_rng_state=False)
        else:
            out[:, some] = gather(*given)
    out = out.view(b, h, -1, d)[:, :, :length]
    return out.transpose(1, 2).to(dtype)


def _has_cache(device) -> bool:
    """True where the keys of one query block stay near, and a launch costs nothing."""
    return device.type == "cpu"


def _elements(device) -> int:
    return BITE if _has_cache(device) else SLICE


def linear_branch(q, k, v, proj_weight, proj_bias, fold: bool = True):
    """Linear attention over all keys, softmax over channels as feature map, then the projection proj_l.

    q, k, v: [B, L, H, D]; proj_weight [D, D], proj_bias [D]. With fold, the projection is multiplied into the
    [D, D] key-value matrix of each head first, which is exact because the divisor is one number per row.
    Returns [B, L, H, D] in q's dtype.
    """
    dtype = q.dtype
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    cq, ck = q.softmax(-1, dtype=torch.float32), k.softmax(-1, dtype=torch.float32)
    divisor = 1e-5 + cq @ ck.sum(2).unsqueeze(-1)
    exact = torch.float32 if v.dtype == torch.float16 else v.dtype  # sums over all tokens leave the range of float16
    kv = ck.to(exact).transpose(-1, -2) @ v.to(exact)
    weight, bias = proj_weight.float(), proj_bias.float()
    if fold:
        out = cq @ (kv.float() @ weight.t()) / divisor + bias
    else:
        out = F.linear(cq @ kv.float() / divisor, weight, bias)
    return out.transpose(1, 2).to(dtype)


def sparse_linear_attention(q, k, v, proj_weight, proj_bias, topk, coverage, block_q, block_k, precision):
    """Both branches, some heads at a time; arguments as of turbo_core.sla.sparse_linear_attention."""
    out = q.new_empty(q.shape)
    b, _, h, d = q.shape
    step = max(1, _elements(q.device) // (b * max(q.shape[1], k.shape[1]) * d))
    for start in range(0, h, step):
        heads = (slice(None), slice(None), slice(start, start + step))
        some = q[heads], k[heads], v[heads]
        if topk == 1.0 and coverage is None and precision == "bf16":
            part = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in some)).transpose(1, 2)
        else:
            index, counts = _select(*some[:2], topk, coverage, block_q, block_k)
            part = sparse_attention(*some, index, block_q, block_k, precision, counts)
        out[heads] = part
        if proj_weight is not None:
            out[heads].add_(linear_branch(*some, proj_weight, proj_bias))
    return out


def _select(q, k, topk, coverage, block_q, block_k):
    if coverage is None:
        return top_map(q, k, topk, block_q, block_k), None
    return covering_map(q, k, coverage, block_q, block_k)


def sla_from_qkv(qkv, sums, norm_q, norm_k, eps, cos, sin, proj_weight, proj_bias, topk, coverage, precision):
    """The same of q, k, v as their projections left them; arguments as of turbo_core.sla.sla_from_qkv."""
    q_sums, k_sums = (None, None) if sums is None else sums
    q, k = normed(qkv[0], q_sums, norm_q, eps, cos, sin), normed(qkv[1], k_sums, norm_k, eps, cos, sin)
    return sparse_linear_attention(q, k, qkv[2], proj_weight, proj_bias, topk, coverage, 128, 64, precision)


def sla_from_qkv_quantized(qkv, *given):
    """The same as int8 in the block format: (int8 [B * L, H * D], float32 scale)."""
    return quantize_block(sla_from_qkv(qkv, *given).view(-1, qkv.shape[3] * qkv.shape[4]))


def normed(x, sums, weight, eps, cos, sin):
    """RMSNorm over all heads together, then RoPE, in float32 with one rounding at the end.

    x: [B, L, H, D]; sums: float32 [P, B * L], partial sums of squares of a token, None reads them from x; weight:
    [H * D]; cos, sin: float32 [L, D / 2], by which neighbouring channel pairs turn. Weight or cos None leaves that
    step out. Returns x's shape and dtype.
    """
    b, length, h, d = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    squares = None if sums is None else sums.sum(0).view(b, length, 1, 1)
    step = max(1, _elements(x.device) // (b * h * d))
    for part in (slice(start, start + step) for start in range(0, length, step)):
        y = x[:, part].float()
        if weight is not None:
            total = y.square().sum((2, 3), keepdim=True) if squares is None else squares[:, part]
            y = y * torch.rsqrt(total / (h * d) + eps) * weight.float().view(h, d)
        if cos is not None:
            y = rotate(y, cos[part, None].float(), sin[part, None].float())
        out[:, part] = y
    return out
