"""y = x w^T on int8 matrices with float32 scales, and the forms of it that a Wan block needs.

x [M, K] and w [N, K]. Block format: one scale for each 128 x 128 block, [ceil(M/128), ceil(K/128)] and [ceil(N/128),
ceil(K/128)]; the sums of each 128 products become float32, exactly, and are scaled and added. Row format: [M, 1] and
[N, 1]; one int32 sum, scaled once. y is [M, N], everything contiguous. Its reference: turbo_core/int8/reference.py.
"""

import torch
import triton
import triton.language as tl

from . import int8_configs, launch
from .int8_mm_persistent import int8_mm_persistent_kernel
from .int8_tile import MAGIC, MAGIC_VALUE, finish_tile, tile_place

SPAN = 128  # side of a scale block, columns of a row's statistics


@triton.jit(do_not_specialize=["M", "group_rows"])
def int8_mm_kernel(
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
    EVEN_K: tl.constexpr,
    GELU: tl.constexpr,
    ONE_GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr,  # of one dot, which takes two on sm_8x
    GROUP_M: tl.constexpr,
    SPAN: tl.constexpr,
):
    # one program owns one BLOCK_M x BLOCK_N tile of y
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    which = 0
    if w1_ptr is None:
        row, column = tile_place(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    else:
        # the tiles of q, k and v of one row of tiles are neighbours: x is read once
        row, column = tile_place(tl.program_id(0), tiles_m, 3 * tiles_n, GROUP_M)
        which, column = column // tiles_n, column % tiles_n
        w_ptr = tl.where(which == 0, w_ptr, tl.where(which == 1, w1_ptr, w2_ptr))
        w_scale_ptr = tl.where(which == 0, w_scale_ptr, tl.where(which == 1, w1_scale_ptr, w2_scale_ptr))
        if bias_ptr is not None:
            bias_ptr = tl.where(which == 0, bias_ptr, tl.where(which == 1, bias1_ptr, bias2_ptr))
    m0, n0 = row * BLOCK_M, column * BLOCK_N
    # rows past the end read the last one again: their products are not stored
    rows, columns = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - m0), tl.minimum(tl.arange(0, BLOCK_N), N - 1 - n0)
    depth = tl.arange(0, DEPTH)
    x_ptrs = x_ptr + m0.to(tl.int64) * K + (rows[:, None] * K + depth[None, :])
    w_ptrs = w_ptr + n0.to(tl.int64) * K + (columns[None, :] * K + depth[:, None])
    blocks = tl.cdiv(K, SPAN)
    x_scale_ptrs = x_scale_ptr + m0 // SPAN * blocks
    w_scale_ptrs = w_scale_ptr + n0 // SPAN * blocks
    if BLOCK_N > SPAN:
        w_scale_ptrs += columns // SPAN * blocks
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for block in range(blocks):
        if not ROWS:
            scale = tl.load(x_scale_ptrs + block) * tl.load(w_scale_ptrs + block)  # before the dot, which hides it
            total = tl.full((BLOCK_M, BLOCK_N), MAGIC, tl.int32)
        for part in tl.static_range(SPAN // DEPTH):
            if EVEN_K:
                x, w = tl.load(x_ptrs), tl.load(w_ptrs)
            else:
                left = K - block * SPAN - part * DEPTH
                x = tl.load(x_ptrs, depth[None, :] < left, other=0)
                w = tl.load(w_ptrs, depth[:, None] < left, other=0)
            total = tl.dot(x, w, total, out_dtype=tl.int32)
            x_ptrs += DEPTH
            w_ptrs += DEPTH
        if not ROWS:
            if BLOCK_N > SPAN:
                scale = scale[None, :]
            y += (total.to(tl.float32, bitcast=True) - MAGIC_VALUE) * scale
    if ROWS:
        y = total.to(tl.float32) * tl.load(x_scale_ptr + m0 + rows)[:, None]
        y *= tl.load(w_scale_ptr + n0 + columns)[None, :]
    finish_tile(
        y,
        m0,
        n0,
        which,
        y_ptr,
        bias_ptr,
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


def prepare(form, x_q, x_scale, weights, scales, biases, y, gelu=False, config=None, card=None, **epilogue):
    """(kernel, grid, arguments, options) of a launch; launch.run runs it.

    form: "plain", "quantize", "residual" or "qkv". config: an int8_configs.Config, default from the table. card: the
    kind to prepare for, see int8_configs.card_kind, default that of x's device. epilogue: further operands of
    finish_tile by name.
    """
    (m, k), n = x_q.shape, weights[0].shape[0]
    blocks = -(-k // SPAN)
    rows = _format(x_q, x_scale, weights, scales) == "row"
    if not rows and (x_scale.shape != (-(-m // SPAN), blocks) or scales[0].shape != (-(-n // SPAN), blocks)):
        raise ValueError(f"scales {list(x_scale.shape)} and {list(scales[0].shape)} of int8 {[m, k]} and {[n, k]}")
    if any(w.shape != (n, k) for w in weights) or any(b is not None and b.shape != (n,) for b in biases):
        found = [list(t.shape) for t in (*weights, *biases) if t is not None]
        raise ValueError(f"weights must be {[n, k]} and biases {[n]}, got {found}")
    if len({b is None for b in biases}) > 1:
        raise ValueError("biases must be all there or none")
    tensors = [t for t in (x_q, x_scale, y, *weights, *scales, *biases, *epilogue.values()) if t is not None]
    if not all(t.is_contiguous() for t in tensors):
        raise ValueError(f"every operand must be contiguous, got strides {[t.stride() for t in tensors]}")
    gate = epilogue.get("gate")
    gates = 1 if gate is None else gate.shape[0]
    name = f"{_format(x_q, x_scale, weights, scales)} {form}"
    config = config or int8_configs.config(name, m, x_q.device, card, gates)
    if config.variant != "pointers" and (k % 16 or any(t.data_ptr() % 16 for t in (x_q, *weights))):
        config = int8_configs.DEFAULT  # what the tensor memory accelerator cannot address
    if form == "quantize" and (config.block_m, config.block_n) != (SPAN, SPAN):
        raise ValueError(f"a tile must be one scale block, got {config}")
    operands = [t for operand in zip(weights, scales, biases) for t in operand] + [None] * 3 * (3 - len(weights))
    extra = [epilogue.get(name) for name in ("y_scale", "residual", "gate", "stats", "squares")]
    arguments = (x_q, x_scale, *operands, y, *extra, m, n, k, m // gates)
    options = {
        "ROWS": rows,
        "GELU": gelu,
        "ONE_GATE": gates == 1,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "GROUP_M": config.group_m,
        "SPAN": SPAN,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    tiles = -(-m // config.block_m) * -(-n // config.block_n) * len(weights)
    if config.variant == "pointers":
        return int8_mm_kernel, (tiles,), arguments, options | {"EVEN_K": k % SPAN == 0, "DEPTH": config.depth}
    if config.depth != SPAN:
        raise ValueError(f"the dots of this variant are {SPAN} deep, got {config}")
    options |= {"SPECIALIZE": config.variant == "specialized", "CONVERT": config.variant == "converting"}
    return int8_mm_persistent_kernel, (min(tiles, launch.processors(x_q.device)),), arguments, options


def _format(x_q, x_scale, weights, scales, *_):
    rows = x_scale.shape == (len(x_q), 1) and scales[0].shape == (len(weights[0]), 1)
    return "row" if rows else "block"


def _run(form, x_q, *operands, config=None, **epilogue):
    """prepare and launch; a launch of a table that fails is made again as the next plainer one."""
    try:
        launch.run(*prepare(form, x_q, *operands, config=config, **epilogue))
    except launch.LaunchError as error:
        name, gate = f"{_format(x_q, *operands)} {form}", epilogue.get("gate")
        gates = 1 if gate is None else len(gate)
        if config is not None or not int8_configs.drop(x_q.device, name, len(x_q), error, gates):
            raise
        _run(form, x_q, *operands, **epilogue)


def int8_mm(x_q, x_scale, w_q, w_scale, bias=None, out_dtype=torch.bfloat16, gelu=False, config=None):
    """Returns [M, N] in out_dtype: x w^T + bias, after GELU where asked."""
    y = torch.empty(x_q.shape[0], w_q.shape[0], dtype=out_dtype, device=x_q.device)
    _run("plain", x_q, x_scale, [w_q], [w_scale], [bias], y, gelu, config=config)
    return y


def int8_mm_quantize(x_q, x_scale, w_q, w_scale, bias=None, gelu=True, config=None):
    """Returns (int8 [M, N], float32 [ceil(M/128), ceil(N/128)]): the same in the block format, as x and w must be."""
    y = torch.empty(x_q.shape[0], w_q.shape[0], dtype=torch.int8, device=x_q.device)
    scale = x_scale.new_empty(-(-y.shape[0] // SPAN), -(-y.shape[1] // SPAN))
    _run("quantize", x_q, x_scale, [w_q], [w_scale], [bias], y, gelu, config=config, y_scale=scale)
    return y, scale


def int8_mm_residual(x_q, x_scale, w_q, w_scale, bias, residual, gate=None, stats=True, config=None):
    """Returns (residual + gate * (x w^T + bias) [M, N], row statistics float32 [ceil(N/128), M, 2] or None)."""
    m, n = residual.shape
    with torch.inference_mode(False):  # writes to it are counted: statistics hold until the first one
        y = torch.empty_like(residual)
    stats = x_scale.new_empty(-(-n // SPAN), m, 2) if stats else None
    extra = {"residual": residual, "gate": gate, "stats": stats}
    _run("residual", x_q, x_scale, [w_q], [w_scale], [bias], y, config=config, **extra)
    return y, stats


def int8_mm_qkv(x_q, x_scale, weights, scales, biases=None, out_dtype=torch.bfloat16, config=None):
    """Returns (y [3, M, N], sums of squares of the rows of q and k, float32 [2, ceil(N/128), M])."""
    m, n = x_q.shape[0], weights[0].shape[0]
    y = torch.empty(3, m, n, dtype=out_dtype, device=x_q.device)
    squares = x_scale.new_empty(2, -(-n // SPAN), m)
    biases = biases or [None] * 3
    _run("qkv", x_q, x_scale, weights, scales, biases, y, config=config, squares=squares)
    return y, squares
