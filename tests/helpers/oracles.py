"""What the operations mean, in float64: int8 products with their epilogues, norms, sparse-linear attention."""

import torch
import torch.nn.functional as F

from turbo_core import int8


def product(x, w, bias=None, gelu=False):
    """x w^T + bias of int8 matrices (q, scale), after GELU where asked."""
    y = int8.dequantize(*x).double() @ int8.dequantize(*w).double().t()
    y = y if bias is None else y + bias.double()
    return F.gelu(y, approximate="tanh") if gelu else y


def gated(y, residual, gate):
    """residual + gate * y; gate [G, N], one row for each M/G rows, or None for 1."""
    if gate is not None:
        y = y * gate.double().repeat_interleave(len(y) // len(gate), 0)
    return residual.double() + y


def row_stats(y):
    """[ceil(N/128), M, 2]: mean and sum of squared deviations of each row's spans of 128 columns."""
    spans = y.double().split(128, 1)
    return torch.stack([torch.stack([s.mean(1), ((s - s.mean(1, True)) ** 2).sum(1)], -1) for s in spans])


def row_squares(y):
    """[ceil(N/128), M]: sum of squares of each row's spans of 128 columns."""
    return torch.stack([span.double().square().sum(1) for span in y.split(128, 1)])


def assert_near(y, expected, tolerance):
    """Largest difference relative to the largest value; a NaN fails."""
    assert y.shape == expected.shape
    error = (y.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
    assert error.item() <= tolerance, error.item()


def layer_norm(x, eps, weight=None, bias=None, shift=None, scale=None):
    """(LayerNorm(x) * weight + bias) * (1 + scale) + shift; shift, scale [G, K], one row for each M/G rows of x."""
    x = x.double()
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + eps).sqrt()
    x = x if weight is None else x * weight
    x = x if bias is None else x + bias
    x = x if scale is None else x * (1 + scale.double().repeat_interleave(len(x) // len(scale), 0))
    return x if shift is None else x + shift.repeat_interleave(len(x) // len(shift), 0)


def rms_norm(x, weight, eps):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def rotated(x, angles):
    """RoPE: neighbouring channel pairs of x [B, L, H, D] turned by angles [L, D / 2]."""
    turn = torch.polar(torch.ones_like(angles).double(), angles.double())[:, None]
    return torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn).flatten(-2)


def attention(q, k, v, index=None, counts=None, block_q=128, block_k=64):
    """Softmax attention under the mask that the block map stands for, or over all keys. [B, L, H, D].

    index: [B, H, q blocks, kept]; counts [B, H, q blocks]: how many of a row's blocks count, None for all.
    """
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    score = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if index is not None:
        if counts is not None:
            index = torch.where(torch.arange(index.shape[3]) < counts[..., None], index, index[..., :1])
        kept = torch.zeros(*index.shape[:3], -(-k.shape[2] // block_k), dtype=torch.bool)
        kept.scatter_(3, index.long(), True)
        mask = kept.repeat_interleave(block_q, 2)[:, :, : q.shape[2]].repeat_interleave(block_k, 3)
        score = score.masked_fill(~mask[..., : k.shape[2]], -torch.inf)
    return (score.softmax(-1) @ v).transpose(1, 2)


def linear_branch(q, k, v, weight, bias):
    """The published linear branch: linear attention over all keys, softmax over channels, then proj_l. [B, L, H, D]."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    cq, ck = q.softmax(-1), k.softmax(-1)
    out = cq @ (ck.transpose(-1, -2) @ v) / (1e-5 + (cq * ck.sum(2, keepdim=True)).sum(-1, keepdim=True))
    return (out @ weight.double().T + bias.double()).transpose(1, 2)
