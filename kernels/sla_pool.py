"""What sparse-linear attention must know over all tokens first: block means, the mean key, the range of v."""

import torch
import triton
import triton.language as tl

from .launch import run
from .rope import load_rotation, load_weight, norm_and_rotate, rms_factors

PART = 32  # tokens at a time: q, k and v of twice as many fill the registers, and a multiprocessor holds one program
GROUP = 4  # heads per program: they share cos, sin and the row sums, which together are as large as one head of q


@triton.jit
def _pool_kernel(
    q_ptr,  # [B, Lq, H, D]
    q_strides,
    k_ptr,  # [B, Lk, H, D]
    k_strides,
    v_ptr,  # [B, Lk, H, D] or None
    v_strides,
    sums_ptr,  # [2, P, B * L] or None
    q_weight_ptr,  # [H * D] or None
    k_weight_ptr,
    cos_ptr,  # [L, D / 2] or None
    sin_ptr,
    pooled_q_ptr,  # [B, H, ceil(Lq / 128), D]
    pooled_k_ptr,  # [B, H, ceil(Lk / 64), D]
    v_part_ptr,  # [B, H, ceil(Lk / 128), D] or None
    Lq,
    Lk,
    B,
    H,
    partials,
    eps,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    PART: tl.constexpr,
):
    # one program owns 128 tokens of GROUP heads of one sample: a block of q and two of k, PART tokens at a time
    block, first, b = tl.program_id(0), tl.program_id(1) * GROUP, tl.program_id(2).to(tl.int64)
    d = tl.arange(0, D)
    heads = first + tl.arange(0, GROUP)
    blocks_q, blocks_k, blocks_v = tl.cdiv(Lq, 128), tl.cdiv(Lk, 64), tl.cdiv(Lk, 128)
    rows = (b * H + heads)[:, None]
    there = (heads < H)[:, None]
    q_sum = tl.zeros((GROUP, D), tl.float32)
    k_sum = tl.zeros((GROUP, D), tl.float32)
    v_amax = tl.zeros((GROUP, D), tl.float32)
    for part in range(128 // PART):
        tokens = block * 128 + part * PART + tl.arange(0, PART)  # Lq = Lk where there is something to norm or to rotate
        in_q, in_k = tokens < Lq, tokens < Lk
        cos, sin = load_rotation(cos_ptr, tokens, in_k, D), load_rotation(sin_ptr, tokens, in_k, D)
        q_factors = rms_factors(sums_ptr, b * Lk + tokens, in_k, partials, B * Lk, H * D, eps, 0)
        k_factors = rms_factors(sums_ptr, b * Lk + tokens, in_k, partials, B * Lk, H * D, eps, 1)
        wide = tokens.to(tl.int64)[:, None]
        for i in range(min(GROUP, H - first)):
            head = first + i
            own = tl.arange(0, GROUP)[:, None] == i

            # all loads first: they are under way together
            q_at = q_ptr + b * q_strides[0] + head.to(tl.int64) * q_strides[2]
            q = tl.load(q_at + wide * q_strides[1] + d[None, :], in_q[:, None], other=0.0)
            k_at = k_ptr + b * k_strides[0] + head.to(tl.int64) * k_strides[2]
            k = tl.load(k_at + wide * k_strides[1] + d[None, :], in_k[:, None], other=0.0)
            if v_ptr is not None:
                v_at = v_ptr + b * v_strides[0] + head.to(tl.int64) * v_strides[2]
                v = tl.load(v_at + wide * v_strides[1] + d[None, :], in_k[:, None], other=0.0)

            q = norm_and_rotate(q, q_factors, load_weight(q_weight_ptr, head, D), cos, sin)
            q_sum += tl.where(own, tl.sum(q, 0)[None, :], 0.0)

            k = norm_and_rotate(k, k_factors, load_weight(k_weight_ptr, head, D), cos, sin)
            k_sum += tl.where(own, tl.sum(k, 0)[None, :], 0.0)

            if v_ptr is not None:
                v = tl.abs(v.to(tl.float32))
                v = tl.where(v < float("inf"), v, 0.0)  # neither NaN nor infinity may widen the scale of the others
                v_amax = tl.maximum(v_amax, tl.where(own, tl.max(v, 0)[None, :], 0.0))
        half = (part + 1) * PART // 64  # blocks of keys that are summed by now
        left = Lk - block * 128 - half * 64 + 64
        if ((part + 1) * PART % 64 == 0) & (left > 0):
            at = pooled_k_ptr + (rows * blocks_k + block * 2 + half - 1) * D + d[None, :]
            tl.store(at, k_sum / tl.minimum(left, 64), there)
            k_sum = tl.zeros((GROUP, D), tl.float32)
    if block < blocks_q:
        at = pooled_q_ptr + (rows * blocks_q + block) * D + d[None, :]
        tl.store(at, q_sum / tl.minimum(Lq - block * 128, 128), there)
    if v_ptr is not None and block < blocks_v:
        v_part = v_part_ptr + (rows * blocks_v + block) * D + d[None, :]
        tl.store(v_part, v_amax, there)


@triton.jit
def _finish_kernel(
    pooled_k_ptr,  # [B * H, ceil(Lk / 64), D]
    v_amax_ptr,  # [B * H, ceil(Lk / 128), D] or None
    k_mean_ptr,  # [B * H, D]
    v_max_ptr,  # [B * H, D] or None
    Lk,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # one program owns BLOCK_D channels of one head and walks over its blocks in order
    head = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    blocks = tl.cdiv(Lk, 64)
    total = tl.zeros((BLOCK_D,), tl.float32)
    count = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, blocks, 64):
        n = start + tl.arange(0, 64)
        tokens = tl.minimum(Lk - n * 64, 64).to(tl.float32)[:, None]
        at = pooled_k_ptr + (head * blocks + n)[:, None] * D + d[None, :]
        mean = tl.load(at, (n < blocks)[:, None], other=float("nan"))
        good = tl.abs(mean) < float("inf")  # a bad block must not reach the others through the mean
        total += tl.sum(tl.where(good, mean * tokens, 0.0), 0)
        count += tl.sum(tl.where(good, tokens, 0.0), 0)
    tl.store(k_mean_ptr + head * D + d, total / count)
    if v_amax_ptr is not None:
        blocks = tl.cdiv(Lk, 128)
        amax = tl.zeros((BLOCK_D,), tl.float32)
        for start in range(0, blocks, 64):
            n = start + tl.arange(0, 64)
            at = v_amax_ptr + (head * blocks + n)[:, None] * D + d[None, :]
            amax = tl.maximum(amax, tl.max(tl.load(at, (n < blocks)[:, None], other=0.0), 0))
        tl.store(v_max_ptr + head * D + d, amax)


def pool_means(q, k, v=None, sums=None, q_weight=None, k_weight=None, eps=1e-6, cos=None, sin=None):
    """Block means of q and k, the mean key, and the largest value of each channel of v, each read once.

    q: [B, Lq, H, D], k, v: [B, Lk, H, D] by stride, last stride 1. Raw form, see kernels/rope.py: sums float32
    [2, P, B * L] with norm weights q_weight, k_weight float32 [H * D]; cos, sin float32 [L, D / 2]; then Lq = Lk.
    Returns float32 pooled_q [B, H, ceil(Lq / 128), D] and pooled_k [B, H, ceil(Lk / 64), D], means over the tokens
    that are there; k_mean [B, H, D] over the blocks that are finite in a channel; v_amax [B, H, D] over finite values,
    None without v. Raises ValueError.
    """
    b, lq, h, d = q.shape
    lk = k.shape[1]
    check_heads(q, k, *(() if v is None else (v,)))
    check_raw(k, sums, (q_weight, k_weight), cos, sin, eps)
    if k.shape != (b, lk, h, d) or (v is not None and v.shape != k.shape):
        raise ValueError("q, k, v must have the same B, H and D, and k and v the same L")
    if lq != lk and not (sums is None and cos is None):
        raise ValueError(f"q and k still to be normed or rotated must have the same length, got {lq} and {lk}")
    pooled_q = q.new_empty(b, h, triton.cdiv(lq, 128), d, dtype=torch.float32)
    pooled_k = q.new_empty(b, h, triton.cdiv(lk, 64), d, dtype=torch.float32)
    k_mean = q.new_empty(b, h, d, dtype=torch.float32)
    v_part = v_amax = None
    if v is not None:
        v_part = q.new_empty(b, h, triton.cdiv(lk, 128), d, dtype=torch.float32)
        v_amax = q.new_empty(b, h, d, dtype=torch.float32)
    strides = [x.stride()[:3] for x in (q, k, k if v is None else v)]
    pointers = (q, strides[0], k, strides[1], v, strides[2], sums, q_weight, k_weight, cos, sin)
    sizes = (lq, lk, b, h, 1 if sums is None else sums.shape[1], eps)
    run(
        _pool_kernel,
        (triton.cdiv(max(lq, lk), 128), triton.cdiv(h, GROUP), b),
        (*pointers, pooled_q, pooled_k, v_part, *sizes),
        {"D": d, "GROUP": GROUP, "PART": PART, "num_warps": d // 32},
    )
    run(
        _finish_kernel,
        (b * h, d // 32),
        (pooled_k, v_part, k_mean, v_amax, lk),
        {"D": d, "BLOCK_D": 32, "num_warps": 4},
    )
    return pooled_q, pooled_k, k_mean, v_amax


def check_heads(*tensors):
    """ValueError unless these are [B, L, H, 64 or 128] of one floating dtype on one device, last stride 1."""
    first = tensors[0]
    for x in tensors:
        if x.ndim != 4 or x.shape[3] not in (64, 128) or 0 in x.shape:
            raise ValueError(f"expected a non-empty [B, L, H, 64 or 128], got {list(x.shape)}")
        if x.stride(3) != 1:
            raise ValueError(f"the last stride must be 1, got strides {x.stride()}")
        if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"expected bfloat16, float16 or float32, got {x.dtype}")
        if x.dtype != first.dtype or x.device != first.device:
            raise ValueError(f"one dtype and device, got {first.dtype} on {first.device}, {x.dtype} on {x.device}")


def check_raw(k, sums, weights, cos, sin, eps=1e-6):
    """ValueError unless the raw form of k [B, L, H, D] is complete: float32, contiguous, of the shapes in rope.py.

    eps must be above 0, since tokens of zeros, and those that are not there, are divided by sqrt(eps).
    """
    b, length, h, d = k.shape
    wanted = {}
    if sums is not None:
        if sums.ndim != 3 or 0 in sums.shape:
            raise ValueError(f"sums must be [2, P, {b * length}], got {list(sums.shape)}")
        if not eps > 0:
            raise ValueError(f"eps must be above 0, got {eps}")
        wanted["sums"] = sums, (2, sums.shape[1], b * length)
        wanted |= {f"norm weight {i}": (weight, (h * d,)) for i, weight in enumerate(weights)}
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin come together")
    if cos is not None:
        wanted |= {"cos": (cos, (length, d // 2)), "sin": (sin, (length, d // 2))}
    for name, (t, shape) in wanted.items():
        if t is None or t.shape != shape or t.dtype != torch.float32 or not t.is_contiguous() or t.device != k.device:
            got = "None" if t is None else f"{list(t.shape)} {t.dtype} on {t.device}"
            raise ValueError(f"{name} must be contiguous float32 {list(shape)} on {k.device}, got {got}")
