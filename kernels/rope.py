"""RMSNorm and rotary embedding of a loaded tile, for kernels that take q and k as the projections left them.

The raw form of q and k: `sums` float32 [2, P, B * L] holds P partial sums of squares per token over the full width
H * D (q's plane, then k's), the norm weights are float32 [H * D], cos and sin float32 [L, D / 2] turn neighbouring
channel pairs. Any of them may be None: then that step is already done. Everything stays in float32, unrounded.
"""

import triton
import triton.language as tl


@triton.jit
def rms_factors(sums_ptr, rows, valid, partials, tokens, width, eps, plane: tl.constexpr = 0):
    """1 / RMS of each row: float32 [T], or None where sums_ptr is None.

    sums_ptr: [2, partials, tokens] with tokens = B * L; plane: 0 for q, 1 for k; rows: int64 [T], batch * L + token;
    valid: bool [T]; width: H * D. Rows that do not exist get 1 / sqrt(eps), which is finite.
    """
    if sums_ptr is not None:
        total = tl.zeros(rows.shape, tl.float32)
        # tokens is no tensor where B and L are 1: the compiler makes constants of such arguments
        at = sums_ptr + plane * partials * tl.full((), tokens, tl.int64) + rows
        for _ in range(partials):
            total += tl.load(at, valid, other=0.0)
            at += tokens
        factors = tl.rsqrt(total / width + eps)
    else:
        factors = None
    return factors


@triton.jit
def load_weight(weight_ptr, head, D: tl.constexpr):
    """One head's part of a norm weight [H * D]: float32 [D], or None where weight_ptr is None."""
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + head * D + tl.arange(0, D))
    else:
        weight = None
    return weight


@triton.jit
def load_rotation(table_ptr, tokens, valid, D: tl.constexpr):
    """A tile's rows of cos or of sin: float32 [T, D / 2], or None where table_ptr is None.

    tokens: int [T], 0 to L - 1 within the sample; valid: bool [T].
    """
    if table_ptr is not None:
        at = tokens[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
        table = tl.load(table_ptr + at, valid[:, None], other=0.0)
    else:
        table = None
    return table


@triton.jit
def norm_and_rotate(x, factors, weight, cos, sin):
    """x [T, D] of any dtype -> float32 [T, D], normed and rotated.

    factors: float32 [T] from rms_factors, weight: float32 [D], from load_weight; both None: x is normed already.
    cos, sin: float32 [T, D / 2] from load_rotation, or None: x is rotated already.
    """
    x = x.to(tl.float32)
    if factors is not None:
        x = x * factors[:, None] * weight[None, :]
    if cos is not None:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (x.shape[0], x.shape[1]))
    return x
