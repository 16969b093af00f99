"""The int8 product with as many programs as the card has multiprocessors, fed by the tensor memory accelerator.

For cards from sm_90 on. Same operands and results as int8_mm_kernel; K a multiple of 16, addresses of 16 bytes.
Beyond the matrix the accelerator reads zeros.
"""

import triton
import triton.language as tl

from .int8_tile import MAGIC, MAGIC_VALUE, finish_tile, tile_place


@triton.jit(do_not_specialize=["M", "group_rows"])
def int8_mm_persistent_kernel(
    x_ptr,  # int8 [M, K]
    x_scale_ptr,
    w_ptr,  # int8 [N, K]
    w_scale_ptr,
    bias_ptr,
    w1_ptr,  # these, and those after: the second and third of q, k, v, or None
    w1_scale_ptr,
    bias1_ptr,
    w2_ptr,
    w2_scale_ptr,
    bias2_ptr,
    y_ptr,  # from here on: see finish_tile
    y_scale_ptr,
    residual_ptr,
    gate_ptr,
    stats_ptr,
    squares_ptr,
    M,
    N,
    K,
    group_rows,
    ROWS: tl.constexpr,  # the row format
    GELU: tl.constexpr,
    ONE_GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPAN: tl.constexpr,
    SPECIALIZE: tl.constexpr,  # warps of their own for loads and products
    CONVERT: tl.constexpr,  # sums of 128 products start at zero and are converted, instead of the magic number
):
    # one program owns every num_programs-th tile of y
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    weights: tl.constexpr = 1 if w1_ptr is None else 3
    blocks = tl.cdiv(K, SPAN)
    x_tiles = tl.make_tensor_descriptor(x_ptr, [M, K], [K, 1], [BLOCK_M, SPAN])
    if weights == 1:
        w_tiles = tl.make_tensor_descriptor(w_ptr, [N, K], [K, 1], [BLOCK_N, SPAN])
    tiles = tiles_m * tiles_n * weights
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), warp_specialize=SPECIALIZE):
        row, column = tile_place(tile, tiles_m, weights * tiles_n, GROUP_M)
        which = column // tiles_n
        column = column % tiles_n
        w_here, w_scale_here, bias_here = w_ptr, w_scale_ptr, bias_ptr
        if weights == 3:
            w_here = tl.where(which == 0, w_ptr, tl.where(which == 1, w1_ptr, w2_ptr))
            w_scale_here = tl.where(which == 0, w_scale_ptr, tl.where(which == 1, w1_scale_ptr, w2_scale_ptr))
            if bias_ptr is not None:
                bias_here = tl.where(which == 0, bias_ptr, tl.where(which == 1, bias1_ptr, bias2_ptr))
            w_tiles = tl.make_tensor_descriptor(w_here, [N, K], [K, 1], [BLOCK_N, SPAN])
        m0, n0 = row * BLOCK_M, column * BLOCK_N
        columns = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - n0)
        x_scale_ptrs = x_scale_ptr + m0 // SPAN * blocks
        w_scale_ptrs = w_scale_here + n0 // SPAN * blocks
        if BLOCK_N > SPAN:
            w_scale_ptrs += columns // SPAN * blocks
        y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for block in range(blocks):
            if not ROWS:
                scale = tl.load(x_scale_ptrs + block) * tl.load(w_scale_ptrs + block)
                total = tl.full((BLOCK_M, BLOCK_N), 0 if CONVERT else MAGIC, tl.int32)
            x = x_tiles.load([m0, block * SPAN])
            w = w_tiles.load([n0, block * SPAN])
            total = tl.dot(x, w.T, total, out_dtype=tl.int32)
            if not ROWS:
                if BLOCK_N > SPAN:
                    scale = scale[None, :]
                if CONVERT:
                    y += total.to(tl.float32) * scale
                else:
                    y += (total.to(tl.float32, bitcast=True) - MAGIC_VALUE) * scale
        if ROWS:
            rows = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - m0)
            y = total.to(tl.float32) * tl.load(x_scale_ptr + m0 + rows)[:, None]
            y *= tl.load(w_scale_here + n0 + columns)[None, :]
        finish_tile(
            y,
            m0,
            n0,
            which,
            y_ptr,
            bias_here,
            y_scale_ptr,
            residual_ptr,
            gate_ptr,
            stats_ptr,
            squares_ptr,
            M,
            N,
            group_rows,
            GELU,
            ONE_GATE,
            BLOCK_M,
            BLOCK_N,
            SPAN,
        )
