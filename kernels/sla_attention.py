"""Softmax attention over chosen key blocks with the folded linear branch: SLA in 16 or 32 bits, SageSLA in 8."""

import torch
import triton
import triton.language as tl

from .launch import run
from .rope import load_rotation, load_weight, norm_and_rotate, rms_factors
from .rounding import block_scale, magnitude, row_scale, to_int8
from .sla_linear import linear_means, linear_weights
from .sla_pool import check_heads, check_raw

BLOCK_Q, BLOCK_K = 128, 64  # of the block map
_LOG2E = tl.constexpr(1.4426950408889634)
_LOG2_448 = tl.constexpr(8.807354922057604)  # probabilities reach from 0 to the largest number of fp8 e4m3
_LOWEST = tl.constexpr(-1e30)  # below all scores; of -inf, exp2(-inf - -inf) would be NaN
_MAGIC = tl.constexpr(0x4B400000)  # an int32 sum started here reads as a float32 that is 1.5 * 2^23 too large,
_MAGIC_VALUE = tl.constexpr(12582912.0)  # exactly while |sum| < 2^22: 128 products of int8 stay below 2^21


@triton.jit
def load_query(
    q_ptr,  # of this batch and head
    stride_l,
    start,  # int64: the tile's first query
    local,  # [BLOCK_Q]: 0, 1, 2, ...
    batch,
    samples,
    head,
    heads,
    queries,
    sums_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    partials,
    eps,
    D: tl.constexpr,
):
    """The tile's queries, float32 [BLOCK_Q, D], normed and rotated; zeros where there are none."""
    rows = start.to(tl.int32) + local
    valid = rows < queries
    at = q_ptr + start * stride_l + local[:, None] * stride_l + tl.arange(0, D)[None, :]
    x = tl.load(at, valid[:, None], other=0.0)
    factors = rms_factors(sums_ptr, batch * queries + rows, valid, partials, samples * queries, heads * D, eps)
    weight = load_weight(weight_ptr, head, D)
    cos, sin = load_rotation(cos_ptr, rows, valid, D), load_rotation(sin_ptr, rows, valid, D)
    return norm_and_rotate(x, factors, weight, cos, sin)


@triton.jit
def attend_block(
    state,  # maximum, total [BLOCK_Q] and acc [BLOCK_Q, D] of the online softmax
    q,  # [BLOCK_Q, D]
    block,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    strides,
    keys,
    factor,  # of the scores, in exp2's units
    RAGGED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The online softmax after one more block of keys. RAGGED: the last one, of which a part is not there."""
    maximum, total, acc = state
    stride_kl, stride_vl, stride_vd = strides
    d, at = tl.arange(0, D), tl.arange(0, BLOCK_K)
    fp8: tl.constexpr = v_ptr.dtype.element_ty == tl.float8e4nv
    if fp8:
        # The score tile leaves a thread pairs of keys 8 apart, the next dot wants 4 neighbours of fp8: keys taken in
        # this order give both, and probabilities never move between threads.
        at_k = at // 16 * 16 + at % 8 // 2 * 4 + at % 16 // 8 * 2 + at % 2
    else:
        at_k = at
    start = block.to(tl.int64) * BLOCK_K
    k_at = k_ptr + start * stride_kl + at_k[None, :] * stride_kl + d[:, None]
    v_at = v_ptr + start * stride_vl + at[:, None] * stride_vl + d[None, :] * stride_vd
    if RAGGED:
        there = at_k < keys - block * BLOCK_K
        k = tl.load(k_at, there[None, :], other=0.0)
        v = tl.load(v_at, (at < keys - block * BLOCK_K)[:, None], other=0.0)
    else:
        k = tl.load(k_at)
        v = tl.load(v_at)
    if k_scale_ptr is not None:
        factor = factor * tl.load(k_scale_ptr + block)
        if fp8:
            score = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32)
        else:  # cards without fp8 convert integers slowly
            magic = tl.full((q.shape[0], BLOCK_K), _MAGIC, tl.int32)
            score = tl.dot(q, k, magic, out_dtype=tl.int32).to(tl.float32, bitcast=True) - _MAGIC_VALUE
    else:
        score = tl.dot(q, k, input_precision=PRECISION)
    if RAGGED:
        score = tl.where(there[None, :], score, float("-inf"))
    top = tl.maximum(maximum, tl.max(score, 1) * factor)
    p = tl.exp2(score * factor - (top - _LOG2_448)[:, None])
    decay = tl.exp2(maximum - top)
    total = total * decay + tl.sum(p, 1)
    if fp8:
        p = tl.permute(tl.reshape(p, (q.shape[0], BLOCK_K // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
        p = tl.reshape(p, (q.shape[0], BLOCK_K))
    if fp8:
        # The units of sm_89 and sm_90 add fp8 products in 13 bits and cut off the rest: over the thousands of keys of a
        # row that would shrink the result by a percent and more. So each block is summed by itself, then in float32.
        acc = acc * decay[:, None] + tl.dot(p.to(v.dtype), v, max_num_imprecise_acc=BLOCK_K)
    else:
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return top, total, acc


@triton.jit(do_not_specialize=["queries", "keys", "kept", "partials"])
def attention_kernel(
    q_ptr,  # [B, L, H, D]
    q_strides,
    k_ptr,  # [B, H, keys, D]: int8 where there is k_scale
    k_strides,
    v_ptr,  # [B, H, keys, D]; fp8 lies as [B, H, D, keys rounded up to 64]
    v_strides,
    k_scale_ptr,  # [B, H, ceil(keys / 64)] or None
    v_scale_ptr,  # [B, H, D] or None
    index_ptr,  # [B, H, ceil(L / 128), kept], or None: all blocks
    counts_ptr,  # [B, H, ceil(L / 128)]: so many of kept, or None: all of them
    mean_ptr,  # [B, H, D, D], see kernels/sla_linear.py, or None: no linear branch
    mean_scale_ptr,  # [B, H]
    k_sum_ptr,  # [B, H, D]
    bias_ptr,  # [D]
    sums_ptr,  # raw form of q, see kernels/rope.py
    weight_ptr,
    cos_ptr,
    sin_ptr,
    o_ptr,  # [B, L, H, D], or int8 [B * L, H * D]
    o_scale_ptr,  # [ceil(B * L / 128), H]: o is int8; or None
    samples,
    heads,
    queries,
    keys,
    kept,
    partials,
    eps,
    scale,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MAP_Q: tl.constexpr,
    RAGGED: tl.constexpr,  # there may be a part of a block of keys
    PRECISION: tl.constexpr,
):
    # one program owns BLOCK_Q queries of one head; neighbours share the head's keys and values in the L2 cache
    plane = tl.program_id(1).to(tl.int64)
    batch, head = plane // heads, tl.program_id(1) % heads
    start = tl.program_id(0).to(tl.int64) * BLOCK_Q
    local, d = tl.arange(0, BLOCK_Q), tl.arange(0, D)
    q_ptr += batch * q_strides[0] + head.to(tl.int64) * q_strides[2]
    k_ptr += batch * k_strides[0] + head.to(tl.int64) * k_strides[1]
    v_ptr += batch * v_strides[0] + head.to(tl.int64) * v_strides[1]
    strides = (k_strides[2], v_strides[2], v_strides[3])
    raw = (batch, samples, head, heads, queries, sums_ptr, weight_ptr, cos_ptr, sin_ptr, partials, eps)

    factor = scale * _LOG2E
    if k_scale_ptr is not None:
        k_scale_ptr += plane * tl.cdiv(keys, BLOCK_K)
        x = load_query(q_ptr, q_strides[1], start, local, *raw, D)
        q_scale = row_scale(tl.max(magnitude(x)))
        factor *= q_scale
        q = to_int8(x, q_scale)
    else:
        q = tl.zeros((BLOCK_Q, D), k_ptr.dtype.element_ty)
        # Always so. Without a branch between them, the rotation's joined pairs make the compiler lay out the keys of
        # the dot for values of 8 bits, which 16 bits pay for with a third more instructions.
        if queries > 0:
            q = load_query(q_ptr, q_strides[1], start, local, *raw, D).to(q.dtype)

    # the last block of the ascending table is the only one that can be ragged: all others go without masks
    whole = keys // BLOCK_K
    if index_ptr is not None:
        row = plane * tl.cdiv(queries, MAP_Q) + start // MAP_Q
        index_ptr += row * kept
        steps = kept if counts_ptr is None else tl.load(counts_ptr + row)
        last = tl.load(index_ptr + steps - 1)
    else:
        steps = tl.cdiv(keys, BLOCK_K)
        last = steps - 1
    if RAGGED:
        steps -= (last >= whole).to(tl.int32)
    maximum = tl.full((BLOCK_Q,), _LOWEST, tl.float32)
    state = (maximum, tl.zeros((BLOCK_Q,), tl.float32), tl.zeros((BLOCK_Q, D), tl.float32))
    for i in range(steps):
        block = i if index_ptr is None else tl.load(index_ptr + i)
        state = attend_block(
            state, q, block, k_ptr, v_ptr, k_scale_ptr, strides, keys, factor, False, D, BLOCK_K, PRECISION
        )
    if RAGGED:  # noqa: SIM102 (one is known to the compiler, the other is not)
        if last >= whole:
            state = attend_block(
                state, q, last, k_ptr, v_ptr, k_scale_ptr, strides, keys, factor, True, D, BLOCK_K, PRECISION
            )
    maximum, total, o = state
    o /= total[:, None]
    if v_scale_ptr is not None:
        o *= tl.load(v_scale_ptr + plane * D + d)[None, :]

    if mean_ptr is not None:
        # Loaded again, for registers: kept through the loop, q spills. The zero makes the addresses ones that the
        # compiler cannot know it has had.
        zero = tl.minimum(keys, 0)
        if v_ptr.dtype.element_ty == tl.float8e4nv:
            x = load_query(q_ptr, q_strides[1], start + zero, local + zero, *raw, D)
            w = linear_weights(x, tl.load(k_sum_ptr + plane * D + d)).to(mean_ptr.dtype.element_ty)
        else:  # the branch again: here values of 16 bits go without spills with it, those of 8 bits without it
            w = tl.zeros((BLOCK_Q, D), mean_ptr.dtype.element_ty)
            if queries > 0:
                x = load_query(q_ptr, q_strides[1], start + zero, local + zero, *raw, D)
                w = linear_weights(x, tl.load(k_sum_ptr + plane * D + d)).to(w.dtype)
        mean = tl.load(mean_ptr + plane * D * D + d[:, None] * D + d[None, :])
        mean_scale = tl.load(mean_scale_ptr + plane)
        o = tl.dot(w, mean, o * (1 / mean_scale), input_precision=PRECISION) * mean_scale
        o += tl.load(bias_ptr + d)[None, :]

    valid = (start + local < queries)[:, None]
    if o_scale_ptr is not None:
        tl.static_assert(BLOCK_Q == MAP_Q, "a tile is one scale block")
        o_scale = block_scale(tl.max(tl.where(valid, magnitude(o), 0)))
        tl.store(o_scale_ptr + (batch * queries + start) // BLOCK_Q * heads + head, o_scale)
        o = to_int8(o, o_scale)
    o_ptr += ((batch * queries + start) * heads + head) * D
    tl.store(o_ptr + local[:, None] * (heads * D) + d[None, :], o.to(o_ptr.dtype.element_ty), valid)


def can_quantize(q, low_bit=False) -> bool:
    """True where a tile of q [B, L, H, D] is one scale block of int8; products of float32 have smaller tiles."""
    whole = q.shape[3] == 128 and (q.shape[0] == 1 or q.shape[1] % 128 == 0)
    return whole and (low_bit or q.dtype != torch.float32)


def attention(
    q, k, v, index=None, k_scale=None, v_scale=None, kv_proj=None, k_sum=None, proj_bias=None,
    sums=None, q_weight=None, eps=1e-6, cos=None, sin=None, counts=None, quantize=False,
):  # fmt: skip
    """Attention of each 128 queries over their kept blocks of 64 keys, plus the linear branch.

    q: [B, L, H, D] by stride, D 64 or 128. Raw form, see kernels/rope.py: sums float32 [2 or 1, P, B * L] of which
    q's plane is read, with q_weight float32 [H * D]; cos, sin float32 [L, D / 2].
    k, v, k_scale, v_scale as kernels/sla_prepare.py makes them: k int8 [B, H, keys, D] with k_scale float32
    [B, H, ceil(keys / 64)] and v fp8 [B, H, D, ceil(keys / 64) * 64] or fp16 [B, H, keys, D] with v_scale float32
    [B, H, D]; or both [B, H, keys, D] in q's dtype, by stride, without scales. float32 is multiplied as three TF32.
    index: int32 [B, H, ceil(L / 128), kept], each row ascending; counts int32 [B, H, ceil(L / 128)]: how many of them
    are meant, at least one. None: all. kv_proj, k_sum, proj_bias: see kernels/sla_linear.py, proj_bias float32 [D].
    Returns [B, L, H, D] in q's dtype; with quantize, where can_quantize(q), int8 [B * L, H * D] and its scale float32
    [ceil(B * L / 128), H]. A row that meets a NaN is NaN. Raises ValueError.
    """
    b, length, h, d = q.shape
    check_heads(q)
    check_raw(q, None, (), cos, sin)
    if sums is not None and (sums.ndim != 3 or 0 in sums.shape or not eps > 0):
        raise ValueError(f"sums must be [2 or 1, P, {b * length}] and eps above 0, got {list(sums.shape)} and {eps}")
    keys = k.shape[2]
    low_bit = k.dtype == torch.int8
    fp8 = v.dtype == torch.float8_e4m3fn
    blocks_q, blocks_k = triton.cdiv(length, BLOCK_Q), triton.cdiv(keys, BLOCK_K)
    kept = blocks_k if index is None else index.shape[-1]
    f32, i32, half = torch.float32, torch.int32, (torch.float16 if low_bit else q.dtype)
    for name, t, shape, dtype in (
        ("k", k, (b, h, keys, d), torch.int8 if low_bit else q.dtype),
        ("v", v, (b, h, d, blocks_k * BLOCK_K) if fp8 else (b, h, keys, d), v.dtype if fp8 and low_bit else half),
        ("k_scale", k_scale, (b, h, blocks_k) if low_bit else None, f32),
        ("v_scale", v_scale, (b, h, d) if low_bit else None, f32),
        ("sums", sums, None if sums is None else (len(sums), *sums.shape[1:2], b * length), f32),
        ("q_weight", q_weight, None if sums is None else (h * d,), f32),
        ("index", index, None if index is None else (b, h, blocks_q, kept), i32),
        ("counts", counts, None if counts is None or index is None else (b, h, blocks_q), i32),
        ("kv_proj", kv_proj, None if kv_proj is None else (b, h, d, d), f32),
        ("k_sum", k_sum, None if kv_proj is None else (b, h, d), f32),
        ("proj_bias", proj_bias, None if kv_proj is None else (d,), f32),
    ):
        _check(name, t, shape, dtype, q.device, by_stride=name in "kv")
    if quantize and not can_quantize(q, low_bit):
        raise ValueError(
            "int8 output needs head_dim 128, tokens by 128 in a batch, and 16 bits or less in the products, got "
            f"{q.dtype} {list(q.shape)}"
        )

    single = half == f32
    mean = mean_scale = None
    if kv_proj is not None:
        mean, mean_scale = linear_means(kv_proj, k_sum, f32 if single else torch.float16)
    if quantize:
        o = torch.empty((b * length, h * d), dtype=torch.int8, device=q.device)
        o_scale = torch.empty((triton.cdiv(b * length, BLOCK_Q), h), dtype=f32, device=q.device)
    else:
        o, o_scale = torch.empty((b, length, h, d), dtype=q.dtype, device=q.device), None
    v_strides = (*v.stride()[:2], v.stride(3), v.stride(2)) if fp8 else v.stride()
    sizes = (b, h, length, keys, kept, 1 if sums is None else sums.shape[1], eps, d**-0.5)
    tile_q = 64 if single else BLOCK_Q  # float32 fills the registers, and the shared memory of small cards
    ragged = keys % BLOCK_K > 0
    # Two buffers of keys and of values, three on sm_90. A table's entry is loaded before its block, which takes half of
    # the stages: of 3 the compiler would make one buffer, and every step would wait for its own keys.
    # Over ragged keys of 16 bits without a table 3 stages spill registers on sm_80 and sm_120, on AMD all but 2 do.
    stages = 5 if index is not None else 3 if low_bit or not ragged else 2
    stages = 2 if torch.version.hip else stages
    run(
        attention_kernel,
        (triton.cdiv(length, tile_q), b * h),
        (
            q, q.stride()[:3], k, k.stride()[:3], v, v_strides, k_scale, v_scale, index, counts,
            mean, mean_scale, k_sum, proj_bias, sums, q_weight, cos, sin, o, o_scale, *sizes,
        ),
        {
            "D": d, "BLOCK_Q": tile_q, "BLOCK_K": BLOCK_K, "MAP_Q": BLOCK_Q,
            # with a table or 8 bits always: one form less, and without the second way sm_120 spills registers
            "RAGGED": ragged or low_bit or index is not None,
            "PRECISION": "tf32x3" if single and torch.version.hip is None else "ieee",
            "num_warps": 8,
            "num_stages": stages,
        },
    )  # fmt: skip
    return (o, o_scale) if quantize else o


def _check(name, t, shape, dtype, device, by_stride):
    if shape is None:
        if t is not None:
            raise ValueError(f"{name} does not belong to this form")
        return
    got = "None" if t is None else f"{t.dtype} {list(t.shape)} on {t.device}"
    if t is None or t.shape != shape or t.dtype != dtype or t.device != device:
        raise ValueError(f"{name} must be {dtype} {list(shape)} on {device}, got {got}")
    if t.stride(-1) != 1 or not (by_stride or t.is_contiguous()):
        raise ValueError(f"{name} must be contiguous, got strides {t.stride()}")
