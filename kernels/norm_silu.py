"""RMSNorm over the channels of a video and SiLU in one pass: what stands before each convolution of the Wan VAE.

x is read once and written once, 4 bytes a value in bfloat16 where plain torch moves about 30. The video lies with its
channels innermost, so a row is a pixel; the result may be a part of a larger tensor, where the convolution has the
frames before it.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .norm import load_vector
from .quantize import check_operand, matrix_shape
from .rows import inside_rows, load_rows, part_columns, row_tile, sum_of_squares

_TINY = tl.constexpr(1e-12)  # the least length that a vector is divided by


@triton.jit(do_not_specialize=["M"])
def norm_silu_kernel(
    x_ptr,  # [M, K] any strides
    gamma_ptr,  # [K]
    y_ptr,  # [M, K]
    M,
    K,
    root,  # of K
    stride_m,
    stride_k,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN: tl.constexpr,  # PARTS * WIDTH is K
):
    # one program owns ROWS whole rows, in registers from their one read to their one write
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x = load_rows(x_ptr + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * stride_m, stride_k, K, PARTS, WIDTH, EVEN)
    inverse = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(sum_of_squares(x, PARTS)), _TINY))[:, None]
    for part in tl.static_range(PARTS):
        cols = part_columns(part, WIDTH)
        y = x[part] * inverse
        y *= load_vector(gamma_ptr, cols, K, y, EVEN) * root
        y *= tl.sigmoid(y)
        target = rows.to(tl.int64)[:, None] * K + cols[None, :]
        tl.store(y_ptr + target, y.to(y_ptr.dtype.element_ty), mask=inside_rows(rows, cols, M, K, EVEN))


def norm_silu(x, gamma, out=None):
    """SiLU(x / |x| * sqrt(K) * gamma) of each row of x [M, K], any strides, computed in float32, in out's dtype.

    gamma: [K]. out: contiguous [M, K] to write to, default a new one in x's dtype. Returns out.
    """
    m, k = matrix_shape(x)
    out = torch.empty((m, k), dtype=x.dtype, device=x.device) if out is None else out
    check_operand("gamma", gamma, (k,), x.device)
    check_operand("out", out, (m, k), x.device)
    tile = row_tile(k, values=56)
    launch.run(norm_silu_kernel, (triton.cdiv(m, tile["ROWS"]),), (x, gamma, out, m, k, k**0.5, *x.stride()), tile)
    return out
