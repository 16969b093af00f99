"""The torch twins of kernels/norm.py: same names, same arguments, checked and documented in turbo_core.norms."""

import torch
import torch.nn.functional as F

from .int8 import BLOCK, SLICE, block_scale_shape, quantize_block, quantize_rows


def _slices(x):
    """Slices of the rows of x, whole int8 blocks of 128: their float32 copies stay small beside x."""
    step = max(1, SLICE // max(1, x.shape[1]) // BLOCK) * BLOCK
    return [slice(start, min(start + step, len(x))) for start in range(0, len(x), step)]


def row_stats(x):
    """x [M, K] -> float32 [ceil(K/128), M, 2]."""
    m, k = x.shape
    stats = x.new_empty(-(-k // BLOCK), m, 2, dtype=torch.float32)
    for part in _slices(x):
        for i, span in enumerate(x[part].split(BLOCK, 1)[: len(stats)]):
            variance, mean = torch.var_mean(span.float(), 1, correction=0)
            stats[i, part] = torch.stack((mean, variance * span.shape[1]), 1)
    return stats


def _merge(stats, k, eps):
    """Partial statistics [ceil(k/128), M, 2] -> mean [M, 1], 1 / sqrt(variance + eps) [M, 1], by Chan's formula."""
    means, squares = stats[..., 0], stats[..., 1]
    count = torch.full((len(stats), 1), float(BLOCK), device=stats.device)
    count[-1] = k - BLOCK * (len(stats) - 1)
    mean = (means * count).sum(0) / k
    squares = (squares + count * (means - mean).square()).sum(0)
    return mean[:, None], (squares / k + eps).rsqrt()[:, None]


def layer_norm_quantize(x, eps, weight=None, bias=None, shift=None, scale=None, stats=None, rows=False):
    """x [M, K] -> (int8 [M, K], float32 scale). stats None: LayerNorm's own."""
    m, k = x.shape
    weight, bias, shift, scale = (None if t is None else t.float() for t in (weight, bias, shift, scale))
    q = x.new_empty(m, k, dtype=torch.int8)
    q_scale = x.new_empty((m, 1) if rows else block_scale_shape(m, k), dtype=torch.float32)

    def of_rows(t, part):
        group = torch.arange(part.start, part.stop, device=x.device) // (m // len(t))
        return t if len(t) == 1 else t[group]

    for part in _slices(x):
        y = x[part].float()
        if stats is None:
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


def rms_norm(x, weight, eps):
    """x [M, K] -> [M, K] in x's dtype."""
    y = x.new_empty(x.shape)
    for part in _slices(x):
        y[part] = F.rms_norm(x[part].float(), weight.shape, weight.float(), eps)
    return y
