"""int8 quantization of a tile in registers: the same bits as turbo_core.int8, in ten instructions per value.

bits = tl.max(magnitude(y))            # over a block, or along a row
scale = block_scale(bits)              # or row_scale
q = to_int8(y, scale)
"""

import triton
import triton.language as tl

_ABS: tl.constexpr = tl.constexpr(0x7FFFFFFF)
_TINY: tl.constexpr = tl.constexpr(0x322BCC77)  # 1e-8 as float32: the floor of a block's largest magnitude
_ROUNDER: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float32 next to it has no fraction
_ROUNDER_BITS: tl.constexpr = tl.constexpr(0x4B400000)


@triton.jit
def magnitude(y):
    """|y| of a float32 tile as int32 bits, which order like the numbers. NaN is the largest, where tl.max drops it."""
    return y.to(tl.int32, bitcast=True) & _ABS


@triton.jit
def block_scale(bits):
    """Scale of the block format from the largest magnitude: max(amax, 1e-8) / 128."""
    return tl.maximum(bits, _TINY).to(tl.float32, bitcast=True) * 0.0078125


@triton.jit
def row_scale(bits):
    """Scale of the row format from the largest magnitude: max(amax, 1e-8) / 127."""
    amax = tl.maximum(bits, _TINY).to(tl.float32, bitcast=True)
    return tl.div_rn(amax, 127.0)


@triton.jit
def to_int8(y, scale):
    """y / scale rounded half to even and saturated, y float32, |y| <= 128 scale; zeros where scale is inf or NaN.

    scale: a scalar, or a tensor that broadcasts over y, e.g. [rows, 1].
    """
    # Correctly rounded division by a common divisor: one reciprocal for all, and one Newton step for each value
    # (Markstein). The step leaves the remainder exact, so ties stay ties.
    good = scale < float("inf")
    divisor = tl.where(good, scale, 0.0)
    inverse = tl.where(good, tl.div_rn(1.0, scale), 0.0)
    quotient = y * inverse
    quotient = tl.fma(tl.fma(-divisor, quotient, y), inverse, quotient)
    # +128 is the one value out of range. By a bad scale every quotient is 0 or NaN, of which the minimum makes 0.
    quotient = tl.minimum(quotient, tl.where(good, 127.0, 0.0))
    # adding 1.5 * 2^23 rounds it, and leaves it in the low bits
    return ((quotient + _ROUNDER).to(tl.int32, bitcast=True) - _ROUNDER_BITS).to(tl.int8)
