"""The int8 operations in plain torch: the oracle of the kernels, and the path of every machine without them.

fast.py has the same names with the same arguments and results. Matrices are [M, K] and [N, K], batch and tokens
flattened; an int8 matrix comes with float32 scales in the block or the row format (formats.py). Rows are computed a
slice at a time, whole blocks of them, so that their float32 forms stay small beside x and y, and in a CPU's cache.
Rounded numbers have no gradient; linear.py gives the linear its own.
"""

import torch
import torch.nn.functional as F

from .formats import BLOCK, block_scale_shape, in_blocks, is_row_scale
from .products import SLICE, Room, has_cache, products, slice_rows, threads

BITE = 1 << 19  # elements of x that each thread of a CPU computes at a time, 2 MB in float32
_TINY = 1e-8  # floor of the largest magnitude of a block, so that zeros quantize to zeros


def quantize_block(x, seed: int = 0):
    """float [M, K] -> int8 [M, K], float32 [ceil(M/128), ceil(K/128)]; see turbo_core.int8.quantize_block."""
    x, (m, k) = x.detach(), x.shape
    q, scale = x.new_empty(m, k, dtype=torch.int8), x.new_empty(block_scale_shape(m, k), dtype=torch.float32)
    generator = torch.Generator(device=x.device).manual_seed(seed) if seed > 0 else None
    room = Room()
    for rows in _slices(x) if generator is None else [slice(0, m)]:
        blocks = in_blocks(x[rows].float())
        # largest and smallest apart: no copy of the whole for the magnitudes
        amax = torch.maximum(blocks.amax(3).amax(1), -blocks.amin(3).amin(1)).clamp_min(_TINY)
        y = room.divided(blocks, amax[:, None, :, None]).mul_(128.0)
        if generator is not None:
            y = y.add_(torch.rand(y.shape, generator=generator, device=x.device)).floor_()
        y = y.round_().clamp_(-128, 127).view(len(amax) * BLOCK, -1)
        q[rows] = y[: rows.stop - rows.start, :k]
        scale[rows.start // BLOCK :][: len(amax)] = amax / 128.0
    return q, scale


def quantize_rows(x, out=None):
    """float [M, K] -> int8 [M, K], float32 [M, 1]; out: such a pair to write to."""
    x, (m, k) = x.detach(), x.shape
    q, scale = out or (x.new_empty(m, k, dtype=torch.int8), x.new_empty(m, 1, dtype=torch.float32))
    room, top = Room(), torch.full((), 127.0, device=x.device)
    for rows in _slices(x):
        y = x[rows].float()
        amax = torch.maximum(y.amax(1, keepdim=True), -y.amin(1, keepdim=True)).clamp_min(_TINY)
        scale[rows] = amax / top  # by a number, CUDA multiplies with its rounded reciprocal
        q[rows] = room.divided(y, scale[rows]).round_()  # at most 127: the scale is the largest one's
    return q, scale


def row_stats(x):
    """Mean and sum of squared deviations over each span of 128 columns: [M, K] -> float32 [ceil(K/128), M, 2]."""
    m, k = x.shape
    stats = x.new_empty(-(-k // BLOCK), m, 2, dtype=torch.float32)
    for part in _slices(x):
        stats[:, part] = _span_stats(x[part])
    return stats


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight of each row, in float32: [M, K] -> [M, K] in x's dtype. weight: [K]."""
    y = x.new_empty(x.shape)
    for part in _slices(x):
        y[part] = F.rms_norm(x[part].float(), weight.shape, weight.float(), eps)
    return y


def layer_norm_quantize(x, eps, weight=None, bias=None, shift=None, scale=None, stats=None, rows=False):
    """(LayerNorm(x) * weight + bias) * (1 + scale) + shift, all in float32, quantized to int8.

    x: float [M, K], any strides. weight, bias: float [K] or None. shift, scale: float [G, K] or None, one row for each
    M/G consecutive rows of x. stats: row statistics of x, see row_stats, or None to read x for them; the row format
    has whole rows at hand and does without. Returns (int8 [M, K], its scale), in the row format where rows is True.
    """
    m, k = x.shape
    weight, bias, shift, scale = (None if t is None else t.float() for t in (weight, bias, shift, scale))
    q = x.new_empty(m, k, dtype=torch.int8)
    q_scale = x.new_empty((m, 1) if rows else block_scale_shape(m, k), dtype=torch.float32)

    def of_rows(t, part):
        group = torch.arange(part.start, part.stop, device=x.device) // (m // len(t))
        return t if len(t) == 1 else t[group]

    for part in _slices(x):
        y = x[part].float()
        if stats is None or rows:
            y = F.layer_norm(y, (k,), weight, bias, eps)
        else:
            mean, inverse = _merge(stats[:, part], k, eps)
            y = (y - mean) * inverse
            y = y if weight is None else y * weight
            y = y if bias is None else y + bias
        y = y if scale is None else y * (1 + of_rows(scale, part))
        y = y if shift is None else y + of_rows(shift, part)
        q[part], part_scale = (quantize_rows if rows else quantize_block)(y)
        start = part.start if rows else part.start // BLOCK
        q_scale[start : start + len(part_scale)] = part_scale
    return q, q_scale


def int8_mm(x_q, x_scale, w_q, w_scale, bias=None, out_dtype=torch.bfloat16, gelu=False):
    """x w^T + bias, after GELU (tanh form) where asked: [M, N] in out_dtype. x and w in one format; bias [N]."""
    y = x_scale.new_empty(x_q.shape[0], w_q.shape[0], dtype=out_dtype)
    for rows, columns, part in _products(x_q, x_scale, w_q, w_scale, bias, out_dtype, None if gelu else y):
        y[rows, columns] = _gelu(part) if gelu else part
    return y


def int8_mm_quantize(x_q, x_scale, w_q, w_scale, bias=None, gelu=True):
    """The same quantized from float32: (int8 [M, N], float32 [ceil(M/128), ceil(N/128)]). Block format in and out."""
    m, n = x_q.shape[0], w_q.shape[0]
    y_q, y_scale = x_q.new_empty(m, n), x_scale.new_empty(block_scale_shape(m, n))
    for rows, columns, part in _products(x_q, x_scale, w_q, w_scale, bias, torch.bfloat16):
        y_q[rows, columns], scale = quantize_block(_gelu(part) if gelu else part)
        y_scale[rows.start // BLOCK :, columns.start // BLOCK :][: len(scale), : scale.shape[1]] = scale
    return y_q, y_scale


def int8_mm_residual(x_q, x_scale, w_q, w_scale, bias, residual, gate=None, stats=True):
    """residual + gate * (x w^T + bias), computed in float32, and the row statistics that the next LayerNorm needs.

    residual: float [M, N]. gate: float32 [G, N], one row for each M/G consecutive rows, or None for 1. Returns (y
    [M, N] in residual's dtype, row_stats of y as it is stored, or None without stats).
    """
    m, n = residual.shape
    with torch.inference_mode(False):  # writes to it are counted: statistics hold until the first one
        y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    sums = x_scale.new_empty(-(-n // BLOCK), m, 2) if stats else None
    for rows, columns, part in _products(x_q, x_scale, w_q, w_scale, bias, residual.dtype):
        if gate is not None:
            group = torch.arange(rows.start, rows.stop, device=part.device) // (m // gate.shape[0])
            part.mul_(gate[:, columns] if len(gate) == 1 else gate[group, columns])
        y[rows, columns] = part.add_(residual[rows, columns])
        if stats:
            sums[_spans(columns), rows] = _span_stats(y[rows, columns])
    return y, sums


def int8_mm_qkv(x_q, x_scale, weights, scales, biases=None, out_dtype=torch.bfloat16):
    """Three products of one x, for q, k and v, and what RMSNorm of q and k over their full width needs.

    weights: three int8 [N, K]. scales: theirs. biases: three [N], or None. Returns (y [3, M, N] in out_dtype, float32
    [2, ceil(N/128), M]): sums of squares of each row of q and k, as they are stored, over each span of 128 columns.
    """
    m, n = x_q.shape[0], weights[0].shape[0]
    y = x_scale.new_empty(3, m, n, dtype=out_dtype)
    sums = x_scale.new_empty(2, -(-n // BLOCK), m)
    for i, (w_q, w_scale, bias) in enumerate(zip(weights, scales, biases or (None,) * 3)):
        for rows, columns, part in _products(x_q, x_scale, w_q, w_scale, bias, out_dtype, y[i]):
            y[i, rows, columns] = part
            if i < 2:
                sums[i, _spans(columns), rows] = _span_squares(y[i, rows, columns])
    return y, sums


def int8_linear(x, weight_q, weight_scale, bias=None):
    """Float [M, K] -> [M, N] in x's dtype, x quantized in the weight's format; see turbo_core.int8.int8_linear."""
    by_rows = is_row_scale(weight_q, weight_scale)
    quantize = quantize_rows if by_rows else quantize_block
    y = x.new_empty(len(x), len(weight_q))
    weight = weight_q, weight_scale, by_rows, bias, x.dtype
    for rows, columns, part in products(lambda some: quantize(x[some]), len(x), *weight, y):
        y[rows, columns] = part  # copies nothing where it lies there already
    return y


def _spans(columns):
    """The spans of 128 columns in a slice of columns."""
    return slice(columns.start // BLOCK, -(-columns.stop // BLOCK))


def _slices(x):
    """Slices of the rows of x, whole int8 blocks of 128: their float32 copies stay small beside x."""
    step = slice_rows(x.shape[1], BITE * threads() if has_cache(x.device) else SLICE)
    return [slice(start, min(start + step, len(x))) for start in range(0, len(x), step)]


def _products(x_q, x_scale, w_q, w_scale, bias, dtype, y=None):
    """Yield (slice of rows, slice of columns, their float32 product with bias); slices are whole blocks."""
    # where K <= 128, the scale of a matrix of one row belongs to both formats
    by_rows = is_row_scale(x_q, x_scale) and is_row_scale(w_q, w_scale)

    def part(rows):
        return x_q[rows], x_scale[rows if by_rows else slice(rows.start // BLOCK, -(-rows.stop // BLOCK))]

    return products(part, len(x_q), w_q, w_scale, by_rows, bias, dtype, y)


def _gelu(x):
    return F.gelu(x, approximate="tanh")


def _merge(stats, k, eps):
    """Row statistics [ceil(k/128), M, 2] -> mean [M, 1], 1 / sqrt(variance + eps) [M, 1], by Chan's formula."""
    means, squares = stats[..., 0], stats[..., 1]
    count = torch.full((len(stats), 1), float(BLOCK), device=stats.device)
    count[-1] = k - BLOCK * (len(stats) - 1)
    mean = (means * count).sum(0) / k
    squares = (squares + count * (means - mean).square()).sum(0)
    return mean[:, None], (squares / k + eps).rsqrt()[:, None]


def _span_stats(y):
    """[M, N] -> float32 [ceil(N/128), M, 2]: mean and sum of squared deviations of each row's spans of 128 columns."""
    stats = []
    for span in y.split(BLOCK, 1):
        span = span.float()
        mean = span.mean(1)
        stats.append(torch.stack([mean, (span - mean[:, None]).square().sum(1)], -1))
    return torch.stack(stats)


def _span_squares(y):
    """[M, N] -> float32 [ceil(N/128), M]: sum of squares of each row's spans of 128 columns."""
    return torch.stack([span.float().square().sum(1) for span in y.split(BLOCK, 1)])
