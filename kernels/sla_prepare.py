"""Keys and values as the attention kernel takes them, and the sums over all keys of the linear branch, in one pass."""

import torch
import triton
import triton.language as tl

from .launch import processors, run
from .rope import load_rotation, load_weight, norm_and_rotate, rms_factors
from .rounding import magnitude, row_scale
from .sla_pool import check_heads, check_raw

PROGRAMS = 4  # at most so many for each multiprocessor: whole waves on every card; their partial sums stay small
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["chunk"])  # which depends on the card's number of multiprocessors
def _prepare_kernel(
    k_ptr,  # [B, L, H, D]
    k_strides,
    v_ptr,  # [B, L, H, D]
    v_strides,
    k_mean_ptr,  # [B, H, D]
    v_amax_ptr,  # [B, H, D]
    sums_ptr,  # [2, P, B * L] or None
    k_weight_ptr,  # [H * D] or None
    cos_ptr,  # [L, D / 2] or None
    sin_ptr,
    k_out_ptr,  # [B, H, L, D]: int8 where there is k_scale, else k's dtype; None: k stays where it is
    k_scale_ptr,  # [B, H, ceil(L / 64)] or None
    v_out_ptr,  # fp8 [B, H, D, ceil(L / 64) * 64], fp16 [B, H, L, D] or None
    v_scale_ptr,  # [B, H, D]
    partial_ptr,  # [B, H, splits, D + 1, D]: ck^T v and below it the sum of ck, or None
    L,
    B,
    H,
    partials,
    eps,
    chunk,  # blocks of 64 keys per program
    D: tl.constexpr,
    EXACT: tl.constexpr,
):
    # one program owns chunk blocks of 64 keys of one head; heads run fastest, since their keys lie side by side
    head, split, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    plane = b * H + head
    d = tl.arange(0, D)
    blocks = tl.cdiv(L, 64)
    k_ptr += b * k_strides[0] + head.to(tl.int64) * k_strides[2]
    v_ptr += b * v_strides[0] + head.to(tl.int64) * v_strides[2]
    weight = load_weight(k_weight_ptr, head, D)
    if k_scale_ptr is not None:
        k_mean = tl.load(k_mean_ptr + plane * D + d)
    if v_out_ptr is not None:
        amax = tl.maximum(tl.load(v_amax_ptr + plane * D + d), 1e-8)
        v_factor = tl.div_rn(448.0, amax)
        if split == 0:
            tl.store(v_scale_ptr + plane * D + d, tl.div_rn(amax, 448.0))
    if partial_ptr is not None:
        kv = tl.zeros((D, D), tl.float32)
        k_sum = tl.zeros((D,), tl.float32)
    for block in range(split * chunk, min(split * chunk + chunk, blocks)):
        tokens = block * 64 + tl.arange(0, 64)
        valid = tokens < L
        wide = tokens.to(tl.int64)[:, None]
        k = tl.load(k_ptr + wide * k_strides[1] + d[None, :], valid[:, None], other=0.0)
        v = tl.load(v_ptr + wide * v_strides[1] + d[None, :], valid[:, None], other=0.0)
        factors = rms_factors(sums_ptr, b * L + tokens, valid, partials, B * L, H * D, eps, 1)
        cos, sin = load_rotation(cos_ptr, tokens, valid, D), load_rotation(sin_ptr, tokens, valid, D)
        x = norm_and_rotate(k, factors, weight, cos, sin)
        at = (plane * L + wide) * D + d[None, :]
        if k_scale_ptr is not None:
            centred = tl.where(valid[:, None], x - k_mean[None, :], 0.0)
            scale = row_scale(tl.max(magnitude(centred)))
            # NaN also for an infinite key: this block's scores are NaN then. Times infinity, those below zero would
            # become -inf, and the softmax would leave the block out without a trace.
            scale = tl.where(scale < float("inf"), scale, float("nan"))
            tl.store(k_scale_ptr + plane * blocks + block, scale)
            # no quotient passes 127, so that adding 1.5 * 2^23 leaves the rounded number in the low byte
            inverse = tl.broadcast_to(tl.div_rn(1.0, scale), (64, D))
            rounded = tl.fma(centred, inverse, tl.full((64, D), 12582912.0, tl.float32))
            tl.store(k_out_ptr + at, rounded.to(tl.int32, bitcast=True).to(tl.int8), valid[:, None])
        elif k_out_ptr is not None:
            tl.store(k_out_ptr + at, x.to(k_out_ptr.dtype.element_ty), valid[:, None])
        if v_out_ptr is not None:
            y = v.to(tl.float32)
            y = tl.fma(y, tl.zeros_like(y), y * v_factor[None, :])  # NaN for infinity, of which fp8 would make 448
            y = y.to(v_out_ptr.dtype.element_ty)
            if v_out_ptr.dtype.element_ty == tl.float16:
                tl.store(v_out_ptr + at, y, valid[:, None])
            else:
                column = (plane * D + d)[:, None] * (blocks * 64) + tokens[None, :]
                tl.store(v_out_ptr + column, tl.trans(y))
        if partial_ptr is not None:
            e = tl.exp2(x * _LOG2E - (tl.max(x, 1) * _LOG2E)[:, None])
            ck = e * (tl.where(valid, 1.0, 0.0) / tl.sum(e, 1))[:, None]
            k_sum += tl.sum(ck, 0)
            kv = tl.dot(tl.trans(ck.to(v.dtype)), v, kv, input_precision=EXACT)
    if partial_ptr is not None:
        partial_ptr += (plane * tl.num_programs(1) + split) * (D + 1) * D
        tl.store(partial_ptr + d[:, None] * D + d[None, :], kv)
        tl.store(partial_ptr + D * D + d, k_sum)


@triton.jit(do_not_specialize=["splits"])
def _sum_kernel(
    partial_ptr,  # [B * H, splits, D + 1, D]
    kv_ptr,  # [B * H, D, D]
    k_sum_ptr,  # [B * H, D]
    splits,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    # one program owns ROWS rows of one head's sums, and adds the parts in order
    plane = tl.program_id(1).to(tl.int64)
    row, d = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None], tl.arange(0, D)[None, :]
    at = partial_ptr + plane * splits * (D + 1) * D + row * D + d
    total = tl.zeros((ROWS, D), tl.float32)
    for _ in range(splits):
        total += tl.load(at, row <= D, other=0.0)
        at += (D + 1) * D
    tl.store(kv_ptr + (plane * D + row) * D + d, total, row < D)
    tl.store(k_sum_ptr + plane * D + (row - D) * D + d, total, row == D)


def prepare(
    k,
    v,
    k_mean=None,
    v_amax=None,
    low_bit=True,
    fp8=True,
    linear=True,
    sums=None,
    k_weight=None,
    eps=1e-6,
    cos=None,
    sin=None,
):
    """Keys and values for the attention kernel, and the linear branch's sums over all keys.

    k, v: [B, L, H, D] by stride, last stride 1. Raw form of k, see kernels/rope.py: sums float32 [2, P, B * L], of
    which k's plane is read, with k_weight float32 [H * D]; cos, sin float32 [L, D / 2].
    low_bit: k without k_mean (float32 [B, H, D]) as int8 with a scale per 64 keys, and v by v_amax (float32 [B, H, D])
    as fp8 e4m3, or fp16 without fp8; both from kernels/sla_pool.py. linear: ck = softmax of k over channels.
    Returns k_out [B, H, L, D], k_scale float32 [B, H, ceil(L / 64)], v_out fp8 [B, H, D, ceil(L / 64) * 64] padded with
    zeros or fp16 [B, H, L, D], v_scale float32 [B, H, D], kv = ck^T v float32 [B, H, D, D], k_sum = sum of ck float32
    [B, H, D]; None for what was not asked for. Without low_bit k_out and v_out are in the input's dtype, and views of
    what there is no work on. Raises ValueError.
    """
    b, length, h, d = k.shape
    check_heads(k, v)
    check_raw(k, sums, (k_weight,), cos, sin, eps)
    if v.shape != k.shape:
        raise ValueError(f"k and v must have the same shape, got {list(k.shape)} and {list(v.shape)}")
    blocks = triton.cdiv(length, 64)
    k_out, v_out = k.transpose(1, 2), v.transpose(1, 2)
    k_scale = v_scale = kv = k_sum = partial = None
    new = {"k_out": None, "v_out": None}
    if low_bit:
        for name, x in (("k_mean", k_mean), ("v_amax", v_amax)):
            if x is None or x.shape != (b, h, d) or x.dtype != torch.float32 or not x.is_contiguous():
                raise ValueError(f"{name} must be contiguous float32 {[b, h, d]}")
        k_out = new["k_out"] = k.new_empty(b, h, length, d, dtype=torch.int8)
        k_scale = k.new_empty(b, h, blocks, dtype=torch.float32)
        shape, dtype = ((d, blocks * 64), torch.float8_e4m3fn) if fp8 else ((length, d), torch.float16)
        v_out = new["v_out"] = v.new_empty(b, h, *shape, dtype=dtype)
        v_scale = v.new_empty(b, h, d, dtype=torch.float32)
    elif sums is not None or cos is not None:
        k_out = new["k_out"] = k.new_empty(b, h, length, d)
    programs = PROGRAMS * processors(k.device)
    chunk = triton.cdiv(blocks, max(1, min(blocks, programs // (b * h))))
    splits = triton.cdiv(blocks, chunk)
    if linear:
        partial = k.new_empty(b, h, splits, d + 1, d, dtype=torch.float32)
        kv = k.new_empty(b, h, d, d, dtype=torch.float32)
        k_sum = k.new_empty(b, h, d, dtype=torch.float32)
    if low_bit or linear or new["k_out"] is not None:
        inputs = (k, k.stride()[:3], v, v.stride()[:3], k_mean, v_amax, sums, k_weight, cos, sin)
        sizes = (length, b, h, 1 if sums is None else sums.shape[1], eps, chunk)
        deep = not low_bit and new["k_out"] is not None and k.dtype != torch.float32
        # as many as fit without spilled registers; float32, which only the interpreter gets, spills with any number
        stages = 2 if deep else 1
        exact = "ieee" if torch.version.hip else "tf32x3"  # for float32 alone
        options = {"D": d, "EXACT": exact, "num_warps": d // 16, "num_stages": stages}
        outputs = (new["k_out"], k_scale, new["v_out"], v_scale, partial)
        run(_prepare_kernel, (h, splits, b), (*inputs, *outputs, *sizes), options)
    if linear:
        options = {"D": d, "ROWS": 8, "num_warps": 4}
        run(_sum_kernel, (triton.cdiv(d + 1, 8), b * h), (partial, kv, k_sum, splits), options)
    return k_out, k_scale, v_out, v_scale, kv, k_sum
