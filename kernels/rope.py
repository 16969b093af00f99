"""RMSNorm and rotary embedding of a loaded tile: jit helpers for kernels that take q and k as the projections left them.

The raw form of q and k: `sums` float32 [2, P, B * L] holds P partial sums of squares per token over the full width
H * D (q's plane, then k's), the norm weights are float32 [H * D], cos and sin float32 [L, D / 2] turn neighbouring
channel pairs. Any of them may be None: then that step is already done. Everything stays in float32, unrounded.
"""

import triton
import triton.language as tl


@triton.jit
def rms_factors(sums_ptr, rows, valid, partials, tokens, width, eps):
    """1 / RMS of each row: float32 [T].

    sums_ptr: start of q's or k's plane of sums, [partials, tokens] with tokens = B * L; rows: int64 [T], batch * L +
    token; valid: bool [T] or None when all rows exist; width: H * D. Rows that do not exist get 1 / sqrt(eps): finite.
    """
    total = tl.zeros(rows.shape, tl.float32)
    for _ in range(partials):
        total += tl.load(sums_ptr + rows, valid, other=0.0)
        sums_ptr += tokens
    return tl.rsqrt(total / width + eps)


@triton.jit
def load_rotation(cos_ptr, sin_ptr, tokens, valid, D: tl.constexpr):
    """cos and sin of a tile's tokens: two float32 [T, D / 2], or two None where cos_ptr is None.

    tokens: int [T], 0 to L - 1 within the sample; valid: bool [T].
    """
    if cos_ptr is not None:
        at = tokens[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
        cos = tl.load(cos_ptr + at, valid[:, None], other=0.0)
        sin = tl.load(sin_ptr + at, valid[:, None], other=0.0)
    else:
        cos = None
        sin = None
    return cos, sin


@triton.jit
def norm_and_rotate(x, factors, weight, cos, sin):
    """x [T, D] of any dtype -> float32 [T, D], normed and rotated.

    factors: float32 [T] from rms_factors, weight: float32 [D], this head's part; both None: x is normed already.
    cos, sin: float32 [T, D / 2] from load_rotation, or None: x is rotated already.
    """
    x = x.to(tl.float32)
    if factors is not None:
        x = x * factors[:, None] * weight[None, :]
    if cos is not None:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        x = tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (x.shape[0], x.shape[1]))
    return x
