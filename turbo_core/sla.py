"""Sparse-linear attention (SLA) and its low-bit form (SageSLA), in plain torch.

q, k, v are [B, L, H, D] after q/k RMSNorm and RoPE. Three parts: a block map that keeps the best key blocks per query
block, softmax attention over the kept blocks, and a linear branch over all keys with the trained projection proj_l.
Source: SLA, arXiv 2509.24006; SageSLA, TurboDiffusion, arXiv 2512.16093. Blocks are 128 queries x 64 keys everywhere.
"""

import torch
import torch.nn.functional as F

from .errors import TurboError

HEAD_DIMS = (64, 128)
PRECISIONS = ("bf16", "int8")
GATHERED = 1 << 27  # bytes of gathered keys held at a time: memory stays linear in L whatever top-k is
SLICE = 1 << 25  # elements of q computed at a time: heads are independent, and their copies stay small beside q
_FP8_MAX = 448.0


def _check(q, k, v, topk, precision="bf16"):
    if q.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise TurboError(
            "q, k, v must be [B, L, H, D] with the same B, H, D, and k and v the same L; got "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if q.shape[-1] not in HEAD_DIMS:
        raise TurboError(f"sparse attention supports head_dim 64 and 128, got {q.shape[-1]}: use dense attention")
    if not 0.0 <= topk <= 1.0:
        raise TurboError(f"topk is the fraction of key blocks to keep, 0 to 1, got {topk}: use 0.1 to 0.15")
    if precision not in PRECISIONS:
        raise TurboError(f"precision must be one of {PRECISIONS}, got {precision!r}: use bf16")
    if precision == "int8" and q.device.type == "mps":
        raise TurboError("precision int8 needs float8, which Apple GPUs have not: use bf16")


def _in_blocks(x, block):
    """[B, L, H, D] -> [B * H, blocks, block, D], zero-padded."""
    b, length, h, d = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, -length % block))
    return x.permute(0, 2, 1, 3).reshape(b * h, -1, block, d)


def pool(x, block: int):
    """Mean of each block of tokens, over the tokens that are there.

    x: [B, L, H, D]. Returns float32 [B, H, ceil(L / block), D].
    """
    b, length, h, d = x.shape
    sums = _in_blocks(x, block).sum(2, dtype=torch.float32)
    count = torch.full((sums.shape[1], 1), float(block), device=x.device)
    count[-1] = length - block * (sums.shape[1] - 1)
    return (sums / count).view(b, h, -1, d)


def _nan_unless_finite(x):
    return x.masked_fill(~x.isfinite(), torch.nan)


def kept_blocks(topk: float, blocks: int) -> int:
    """How many key blocks a top-k fraction keeps: the floor, as in the reference, but never none."""
    return min(blocks, max(1, int(topk * blocks)))


def block_map(q, k, topk: float, block_q: int = 128, block_k: int = 64):
    """Key blocks that each query block attends to: those with the highest score of pooled q and pooled k.

    q, k: [B, L, H, D]; topk: fraction of key blocks, floor, at least one block.
    Returns int32 [B, H, ceil(Lq / block_q), kept], ascending; ties go to the lower index.
    """
    _check(q, k, k, topk)
    # Any constant taken off all keys shifts a row of scores as a whole, so the mean is there for precision alone;
    # nanmean and the -inf keep one bad key block from deciding every row.
    pooled_k = _nan_unless_finite(pool(k, block_k))
    pooled_k = pooled_k - pooled_k.nanmean(2, keepdim=True)
    score = pool(q, block_q) @ pooled_k.transpose(-1, -2)
    score = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    best = score.sort(dim=-1, descending=True, stable=True).indices
    return best[..., : kept_blocks(topk, score.shape[-1])].sort(-1).values.to(torch.int32)


def _fake_int8(x):
    """Round [..., block, D] to int8 with one scale per block, and back."""
    scale = x.abs().amax((-1, -2), keepdim=True).clamp_min(1e-8) / 127
    return (x / scale).round_().mul_(scale)


def _fake_fp8(x, scale):
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale


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


def sparse_attention(q, k, v, index, block_q: int = 128, block_k: int = 64, precision: str = "bf16"):
    """Softmax attention of each query block over its kept key blocks.

    q, k, v: [B, L, H, D]; index: int32 [B, H, q blocks, kept], as from block_map. precision "bf16" computes in the
    input's dtype; "int8" rounds q and the mean-free k to int8 per block, and v (per channel) and the probabilities
    to fp8 e4m3, in float32. Returns [B, L, H, D]. Never builds anything of size L x L.
    """
    b, length, h, d = q.shape
    keys, dtype = k.shape[1], q.dtype
    attend = _attend
    if precision == "int8":
        q, k, v = q.float(), k.float(), v.float()
        # the mean of all keys and the scale of all values leave bad ones out: those stay in their own block
        k = k - _nan_unless_finite(k).nanmean(1, keepdim=True)
        v_amax = v.abs().nan_to_num_(nan=0.0, posinf=0.0).amax(1, keepdim=True)
        v = _fake_fp8(v, v_amax.clamp_min(1e-8) / _FP8_MAX)
        attend = _attend_low_bit
    qb, kb, vb = _in_blocks(q, block_q), _in_blocks(k, block_k), _in_blocks(v, block_k)
    if precision == "int8":
        qb, kb = _fake_int8(qb), _fake_int8(kb)
    index = index.reshape(b * h, qb.shape[1], -1).long()
    kept = index.shape[-1]
    batch = torch.arange(b * h, device=q.device)[:, None, None]
    out = torch.empty_like(qb)
    step = max(1, GATHERED // (b * h * kept * block_k * d * kb.element_size()))
    for start in range(0, qb.shape[1], step):
        rows = slice(start, start + step)
        chosen = index[:, rows]
        mask = None
        if keys % block_k:
            mask = chosen[..., None] * block_k + torch.arange(block_k, device=q.device) < keys
            mask = mask.reshape(-1, 1, kept * block_k)
        part = qb[:, rows]
        gathered = (x[batch, chosen].reshape(-1, kept * block_k, d) for x in (kb, vb))
        out[:, rows] = attend(part.reshape(-1, block_q, d), *gathered, mask, d**-0.5).view_as(part)
    out = out.view(b, h, -1, d)[:, :, :length]
    return out.transpose(1, 2).to(dtype)


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


def sparse_linear_attention(
    q, k, v, proj_weight, proj_bias, topk: float, block_q: int = 128, block_k: int = 64, precision: str = "bf16"
):
    """SLA: sparse softmax attention over the top-k key blocks plus the projected linear branch over all keys.

    q, k, v: [B, L, H, D], any L, D 64 or 128. proj_weight [D, D] and proj_bias [D] are proj_l; None means no linear
    branch (training-free sparsity). topk: fraction of key blocks kept, 0.1 to 0.15 for the published models.
    precision: "bf16" (SLA, the input's dtype) or "int8" (SageSLA). Returns [B, L, H, D]. Raises TurboError.
    """
    _check(q, k, v, topk, precision)
    d = q.shape[-1]
    if proj_weight is not None and proj_weight.shape != (d, d):
        raise TurboError(f"proj_l of heads of {d} must be [{d}, {d}], got {list(proj_weight.shape)}")
    attend = torch.ops.turbowan.sparse_linear_attention if torch.compiler.is_compiling() else _by_heads
    return attend(q, k, v, proj_weight, proj_bias, topk, block_q, block_k, precision)


def _by_heads(q, k, v, proj_weight, proj_bias, topk, block_q, block_k, precision):
    out = q.new_empty(q.shape)
    b, _, h, d = q.shape
    step = max(1, SLICE // (b * max(q.shape[1], k.shape[1]) * d))
    for start in range(0, h, step):
        heads = (slice(None), slice(None), slice(start, start + step))
        some = q[heads], k[heads], v[heads]
        if topk == 1.0 and precision == "bf16":
            part = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in some)).transpose(1, 2)
        else:
            index = block_map(*some[:2], topk, block_q, block_k)
            part = sparse_attention(*some, index, block_q, block_k, precision)
        out[heads] = part if proj_weight is None else part + linear_branch(*some, proj_weight, proj_bias)
    return out


# torch.compile gets one node instead of the loops unrolled
_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? proj_weight, Tensor? proj_bias, float topk, int block_q, int block_k, "
    "str precision) -> Tensor"
)
torch.library.custom_op("turbowan::sparse_linear_attention", _by_heads, mutates_args=(), schema=_SCHEMA).register_fake(
    lambda q, *args: q.new_empty(q.shape)
)
