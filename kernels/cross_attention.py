"""Cross-attention: all keys of a text, for queries that are yet to be normed.

The norm goes over all heads together and the attention over one. So a pass of its own reads q once for one number per
token, and the attention norms what it loads: q is never written again, and never held whole by one program, whose 128
queries of a 14B model are 1.3 MB. No model calls this: torch attends to the text until a card has compared the two.
"""

import torch
import triton
import triton.language as tl

from .launch import run
from .sla_attention import attention
from .sla_pool import check_heads


@triton.jit(do_not_specialize=["rows", "length"])
def _square_sums_kernel(
    q_ptr,  # [B, L, K]
    sums_ptr,  # [B * L]
    stride_b,
    stride_l,
    rows,
    length,
    K,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # one program owns ROWS rows
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    at = q_ptr + row // length * stride_b + row % length * stride_l
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, K, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(at[:, None] + column[None, :], valid[:, None] & (column < K)[None, :], other=0.0).to(tl.float32)
        total += x * x
    tl.store(sums_ptr + row, tl.sum(total, 1), valid)


def square_sums(q):
    """Sum of squares of each token over all heads. q: [B, L, H, D], heads side by side. Returns float32 [1, B * L]."""
    b, length, h, d = q.shape
    check_heads(q)
    if q.stride(2) != d:
        raise ValueError(f"heads of {d} must lie side by side, got strides {q.stride()}")
    sums = torch.empty((1, b * length), dtype=torch.float32, device=q.device)
    options = {"ROWS": 4, "COLUMNS": 512, "num_warps": 4}
    arguments = (q, sums, q.stride(0), q.stride(1), b * length, length, h * d)
    run(_square_sums_kernel, (triton.cdiv(b * length, options["ROWS"]),), arguments, options)
    return sums


def cross_attention(q, k, v, sums=None, norm_weight=None, eps=1e-6, quantize=False):
    """Attention over all keys, with RMSNorm of q over the full width on load.

    q: [B, L, H, D] by stride, D 64 or 128; k, v: [B, keys, H, D] by stride, k after its norm. norm_weight: float32
    [H * D], or None: q is normed. sums: float32 [P, B * L], partial sums of squares of each token; None reads q.
    Returns [B, L, H, D] in q's dtype; with quantize, where can_quantize(q), int8 [B * L, H * D] and its scale
    [ceil(B * L / 128), H]. Raises ValueError.
    """
    if norm_weight is not None:
        sums = (square_sums(q) if sums is None else sums)[None]
    elif sums is not None:
        raise ValueError("sums without norm_weight")
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    return attention(q, k, v, sums=sums, q_weight=norm_weight, eps=eps, quantize=quantize)
