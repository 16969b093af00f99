"""The int8 operations in plain torch: the oracle of the kernels, and the path of every machine without them.

fast.py has the same names with the same arguments and results. Matrices are [M, K] and [N, K], batch and tokens
flattened; an int8 matrix comes with float32 scales in the block or the row format (formats.py). Rows are computed a
slice at a time, whole blocks of them, so that the int32 and float32 forms of a product stay small beside x and y.
"""

import torch
import torch.nn.functional as F

from ..devices import has_int_mm, int_mm_pays
from .formats import BLOCK, block_scale_shape, dequantize_block, in_blocks, is_row_scale

SLICE = 1 << 24  # elements of x or y computed at a time
_TINY = 1e-8  # floor of the largest magnitude of a block, so that zeros quantize to zeros


def quantize_block(x, seed: int = 0):
    """float [M, K] -> int8 [M, K], float32 [ceil(M/128), ceil(K/128)]; see turbo_core.int8.quantize_block."""
    x = x.float()
    m, k = x.shape
    blocks = in_blocks(x)
    # largest and smallest apart: no copy of the whole for the magnitudes
    amax = torch.maximum(blocks.amax(3).amax(1), -blocks.amin(3).amin(1)).clamp_min(_TINY)[:, None, :, None]
    q = (blocks / amax).mul_(128.0)
    if seed > 0:
        generator = torch.Generator(device=x.device).manual_seed(seed)
        q = q.add_(torch.rand(q.shape, generator=generator, device=x.device)).floor_()
    q = q.round_().clamp_(-128, 127).to(torch.int8)
    q = q.reshape(q.shape[0] * BLOCK, q.shape[2] * BLOCK)[:m, :k].contiguous()
    return q, (amax / 128.0).view(blocks.shape[0], blocks.shape[2])


def quantize_rows(x, out=None):
    """float [M, K] -> int8 [M, K], float32 [M, 1]; out: such a pair to write to."""
    x = x.float()
    amax = x.abs().amax(dim=1, keepdim=True).clamp_min(_TINY)
    scale = amax / torch.full((), 127.0, device=x.device)  # by a number, CUDA multiplies with its rounded reciprocal
    q = (x / scale).round_().clamp_(-128, 127)
    if out is None:
        return q.to(torch.int8).contiguous(), scale
    return out[0].copy_(q), out[1].copy_(scale)


def row_stats(x):
    """Mean and sum of squared deviations over each span of 128 columns: [M, K] -> float32 [ceil(K/128), M, 2]."""
    m, k = x.shape
    stats = x.new_empty(-(-k // BLOCK), m, 2, dtype=torch.float32)
    for part in _slices(x):
        for i, span in enumerate(x[part].split(BLOCK, 1)[: len(stats)]):
            variance, mean = torch.var_mean(span.float(), 1, correction=0)
            stats[i, part] = torch.stack((mean, variance * span.shape[1]), 1)
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
    for rows, part in _products(x_q, x_scale, w_q, w_scale, bias, out_dtype):
        y[rows] = _gelu(part) if gelu else part
    return y


def int8_mm_quantize(x_q, x_scale, w_q, w_scale, bias=None, gelu=True):
    """The same quantized from float32: (int8 [M, N], float32 [ceil(M/128), ceil(N/128)]). Block format in and out."""
    m, n = x_q.shape[0], w_q.shape[0]
    y_q, y_scale = x_q.new_empty(m, n), x_scale.new_empty(block_scale_shape(m, n))
    for rows, part in _products(x_q, x_scale, w_q, w_scale, bias, torch.bfloat16):
        q, scale = quantize_block(_gelu(part) if gelu else part)
        first = rows.start // BLOCK
        y_q[rows], y_scale[first : first + len(scale)] = q, scale
    return y_q, y_scale


def int8_mm_residual(x_q, x_scale, w_q, w_scale, bias, residual, gate=None, stats=True):
    """residual + gate * (x w^T + bias), computed in float32, and the row statistics that the next LayerNorm needs.

    residual: float [M, N]. gate: float32 [G, N], one row for each M/G consecutive rows, or None for 1. Returns (y
    [M, N] in residual's dtype, row_stats of y as it is stored, or None without stats).
    """
    m, n = residual.shape
    y = torch.empty_like(residual, memory_format=torch.contiguous_format)
    sums = x_scale.new_empty(-(-n // BLOCK), m, 2) if stats else None
    for rows, part in _products(x_q, x_scale, w_q, w_scale, bias, residual.dtype):
        if gate is not None:
            group = torch.arange(rows.start, rows.start + len(part), device=part.device) // (m // gate.shape[0])
            part.mul_(gate[group])
        y[rows] = part.add_(residual[rows])
        if stats:
            sums[:, rows] = _span_stats(y[rows])
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
        for rows, part in _products(x_q, x_scale, w_q, w_scale, bias, out_dtype):
            y[i, rows] = part
            if i < 2:
                sums[i, :, rows] = _span_squares(y[i, rows])
    return y, sums


def int8_linear(x, weight_q, weight_scale, bias=None):
    """Float [M, K] -> [M, N] in x's dtype, x quantized in the weight's format; see turbo_core.int8.int8_linear."""
    m, n = x.shape[0], weight_q.shape[0]
    rows = is_row_scale(weight_q, weight_scale)
    step = slice_rows(weight_q)
    quantize = quantize_rows if rows else quantize_block
    multiply, weight = _multiplier(weight_q, weight_scale, rows, x.dtype)
    y = x.new_empty(m, n)
    for start in range(0, m, step):
        part = multiply(*quantize(x[start : start + step]), *weight)
        y[start : start + step] = part if bias is None else part.add_(bias)
    return y


def slice_rows(weight_q) -> int:
    """Rows of x multiplied at a time: whole blocks of them, so that a slice has the scales that it has in the whole."""
    return max(1, SLICE // max(1, *weight_q.shape) // BLOCK) * BLOCK


def _slices(x):
    """Slices of the rows of x, whole int8 blocks of 128: their float32 copies stay small beside x."""
    step = max(1, SLICE // max(1, x.shape[1]) // BLOCK) * BLOCK
    return [slice(start, min(start + step, len(x))) for start in range(0, len(x), step)]


def _products(x_q, x_scale, w_q, w_scale, bias, dtype):
    """Yield (slice of rows, their float32 product with bias); slices are whole blocks of rows."""
    # where K <= 128, the scale of a matrix of one row belongs to both formats
    by_rows = is_row_scale(x_q, x_scale) and is_row_scale(w_q, w_scale)
    multiply, weight = _multiplier(w_q, w_scale, by_rows, dtype)
    step = slice_rows(w_q)
    for start in range(0, x_q.shape[0], step):
        rows = slice(start, start + step)
        scale = x_scale[rows] if by_rows else x_scale[start // BLOCK : (start + step) // BLOCK]
        part = multiply(x_q[rows], scale, *weight).float()
        yield rows, part if bias is None else part.add_(bias)


def _multiplier(weight_q, weight_scale, rows: bool, dtype):
    """(multiply, arguments): multiply(x_q, x_scale, *arguments) is the product of quantized rows.

    rows: the row format. dtype: that of the result to come. Float32 [M, N], or dtype where floats are multiplied.
    """
    if rows:
        return _mm_rows, (weight_q, weight_scale)
    if not _has_slow_passes(weight_q.device):
        return _mm_block, (weight_q, weight_scale)
    # in the result's own half precision, whose rounding is a tenth of int8's: tensor cores take no float32
    dtype = dtype if dtype.itemsize == 2 else torch.float32
    return _mm_float, (dequantize_block(weight_q, weight_scale, dtype).t(),)


def _has_slow_passes(device) -> bool:
    """True where reading and writing y once for each block of columns takes longer than a product of floats."""
    return device.type != "cpu"


def _mm_rows(x_q, x_scale, w_q, w_scale):
    return _int_mm(x_q, w_q).float().mul_(x_scale).mul_(w_scale.t())


def _mm_block(x_q, x_scale, w_q, w_scale):
    m, n = x_q.shape[0], w_q.shape[0]
    x_scale = x_scale.repeat_interleave(BLOCK, 0)[:m]
    w_scale = w_scale.repeat_interleave(BLOCK, 0)[:n]
    y = x_scale.new_zeros(m, n)
    for b, (x_b, w_b) in enumerate(zip(x_q.split(BLOCK, 1), w_q.split(BLOCK, 1))):
        dot = _int_mm(x_b.contiguous(), w_b.contiguous()).float()
        y.addcmul_(dot.mul_(x_scale[:, b, None]), w_scale[:, b][None, :])
    return y


def _mm_float(x_q, x_scale, weight):
    return dequantize_block(x_q, x_scale, weight.dtype) @ weight


def _int_mm(a, b):
    """int8 [M, K] x int8 [N, K]^T -> int32 [M, N], exact; or float32 where the device is faster at it or has nothing
    else, exact up to K = 1024, beyond that the exact sums of 1024 products added in float32."""
    if has_int_mm(a.device) and int_mm_pays(a.device):
        m, k = a.shape
        # torch 2.13 on a CPU returns garbage for K = 1, which the last block of a ragged K can have
        if k > 1 if a.device.type == "cpu" else m > 16 and k % 8 == 0 and b.shape[0] % 8 == 0:
            return torch._int_mm(a, b.t())
    # float32 holds every partial sum of 1024 products exactly (128 * 128 * 1024 = 2^24)
    a, b = a.float(), b.float()
    return sum(x @ y.t() for x, y in zip(a.split(1024, 1), b.split(1024, 1)))


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
