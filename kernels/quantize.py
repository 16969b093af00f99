"""W8A8 quantization of activations: 128 x 128 blocks or rows, each value read once and written once."""

import torch
import triton
import triton.language as tl

from . import launch
from .rounding import block_scale, magnitude, row_scale, to_int8
from .rows import inside_rows, load_rows, part_columns, row_tile

BLOCK = 128  # rows and columns that share a scale


@triton.jit(do_not_specialize=["M"])
def quantize_block_kernel(
    x_ptr,  # [M, K] any strides
    q_ptr,  # [M, K] int8
    scale_ptr,  # [ceil(M/128), ceil(K/128)] float32
    M,
    K,
    stride_m,
    stride_k,
    BLOCK: tl.constexpr,
):
    # one program owns one BLOCK x BLOCK block, in registers between its one read and its one write
    blocks_k = tl.cdiv(K, BLOCK)
    block_m = tl.program_id(0) // blocks_k
    block_k = tl.program_id(0) % blocks_k
    rows = block_m * BLOCK + tl.arange(0, BLOCK)
    cols = block_k * BLOCK + tl.arange(0, BLOCK)
    # rows past the end repeat the last one, which leaves the maximum as it is
    source = tl.minimum(rows, M - 1).to(tl.int64)[:, None] * stride_m + cols.to(tl.int64)[None, :] * stride_k
    x = tl.load(x_ptr + source, mask=(cols < K)[None, :], other=0.0).to(tl.float32)
    scale = block_scale(tl.max(magnitude(x)))
    tl.store(scale_ptr + tl.program_id(0), scale)
    target = rows.to(tl.int64)[:, None] * K + cols[None, :]
    tl.store(q_ptr + target, to_int8(x, scale), mask=(rows < M)[:, None] & (cols < K)[None, :])


@triton.jit(do_not_specialize=["M"])
def quantize_rows_kernel(
    x_ptr,  # [M, K] any strides
    q_ptr,  # [M, K] int8
    scale_ptr,  # [M] float32
    M,
    K,
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
    bits = magnitude(x[0])
    for part in tl.static_range(1, PARTS):
        bits = tl.maximum(bits, magnitude(x[part]))
    scale = row_scale(tl.max(bits, 1))
    tl.store(scale_ptr + rows, scale, mask=rows < M)
    for part in tl.static_range(PARTS):
        cols = part_columns(part, WIDTH)
        target = rows.to(tl.int64)[:, None] * K + cols[None, :]
        tl.store(q_ptr + target, to_int8(x[part], scale[:, None]), mask=inside_rows(rows, cols, M, K, EVEN))


def quantize_block(x):
    """Quantize [M, K] (float16, bfloat16 or float32, any strides) to int8 in 128 x 128 blocks.

    Returns (q int8 [M, K], scale float32 [ceil(M/128), ceil(K/128)]), the bits of turbo_core.int8.quantize_block.
    """
    m, k = matrix_shape(x)
    q = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scale = torch.empty((triton.cdiv(m, BLOCK), triton.cdiv(k, BLOCK)), dtype=torch.float32, device=x.device)
    options = {"BLOCK": BLOCK, "num_warps": 8}
    launch.run(quantize_block_kernel, (scale.numel(),), (x, q, scale, m, k, *x.stride()), options)
    return q, scale


def quantize_rows(x, out=None):
    """Quantize [M, K] (float16, bfloat16 or float32, any strides) to int8, each row by itself.

    Returns (q int8 [M, K], scale float32 [M, 1]), the bits of turbo_core.int8.quantize_rows; out: such a pair,
    contiguous, to write to.
    """
    m, k = matrix_shape(x)
    if out is None:
        out = torch.empty((m, k), dtype=torch.int8, device=x.device), x.new_empty((m, 1), dtype=torch.float32)
    q, scale = out
    tile = row_tile(k)
    launch.run(quantize_rows_kernel, (triton.cdiv(m, tile["ROWS"]),), (x, q, scale, m, k, *x.stride()), tile)
    return q, scale


def check_operand(name, t, shape, device):
    """ValueError unless t is None, or contiguous and floating, of this shape on this device."""
    if t is None or (t.shape == shape and t.is_floating_point() and t.is_contiguous() and t.device == device):
        return
    got = f"{t.dtype} {list(t.shape)} of strides {list(t.stride())} on {t.device}"
    raise ValueError(f"{name} must be contiguous floats {list(shape)} on {device}, got {got}")


def matrix_shape(x):
    if x.ndim != 2 or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"expected a float16, bfloat16 or float32 matrix [M, K], got {x.dtype} {list(x.shape)}")
    return x.shape
