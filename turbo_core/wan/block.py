"""One block of Wan's transformer: self-attention, dense or sparse-linear, cross-attention, and the feed-forward part.

Where kernels compute, a block whose ten linears are int8 runs as fused.block.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import nn

from ..dispatch import learning
from ..int8 import is_row_scale
from ..sla import sla_from_qkv, sparse_linear_attention
from . import fused
from .layers import Int8Linear, RMSNorm, apply_rope, by_slices, layer_norm, new_modulation, token_slices

_SCORES = 1 << 26  # of an attention, that are kept: 128 MB in bfloat16
# the ten linears of a block that W8A8 replaces
QUANTIZED_LINEARS = tuple(f"{a}.{x}" for a in ("self_attn", "cross_attn") for x in "qkvo") + ("ffn.0", "ffn.2")


class Attention(nn.Module):
    """Multi-head attention with RMSNorm of q and k over the full width. sla adds proj_l under its published name.

    keeps_scores: dense attention of few tokens on a CPU by plain products. For bfloat16, where torch's own
    kernel takes up to twice as long, three times where there are few keys; probabilities are rounded to bfloat16.
    """

    keeps_scores = False

    def __init__(self, dim, num_heads, eps, sla=False):
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)
        if sla:
            head_dim = dim // num_heads
            proj_l = nn.Linear(head_dim, head_dim)
            self.attn_op = nn.ModuleDict({"local_attn": nn.ModuleDict({"proj_l": proj_l})})

    @property
    def proj_l(self):
        return self.attn_op["local_attn"]["proj_l"] if hasattr(self, "attn_op") else None

    def forward(self, x, angles, topk=None, precision="bf16", shards=None):
        """Self-attention of x [B, L, dim]; angles [L, head_dim / 2] are RoPE's. shards: see Block.forward."""
        heads = (self.num_heads, -1)
        angles = angles if shards is None else angles[shards.own]
        q = self.norm_q(self.q(x)).unflatten(-1, heads)
        k = self.norm_k(self.k(x)).unflatten(-1, heads)
        v = self.v(x).unflatten(-1, heads)
        q = apply_rope(q, angles)
        k = apply_rope(k, angles)
        if shards is not None:
            q, k, v = shards.to_heads(q, k, v)
        if topk is None:
            out = _attend(q, k, v, None, self.keeps_scores)
        else:
            out = sparse_linear_attention(q, k, v, *self._projection(), topk, precision=precision).flatten(2)
        del q, k, v  # three times the size of what o is about to make
        return self.o(out if shards is None else shards.to_tokens(out))

    def _projection(self):
        return (None, None) if self.proj_l is None else (self.proj_l.weight, self.proj_l.bias)

    def attend_self(self, qkv, sums, quantized, angles, topk=None, precision="bf16", shards=None):
        """Self-attention between the products, see fused.block. Overwrites qkv."""
        qkv = qkv.unflatten(-1, (self.num_heads, -1))
        if topk is not None:
            weights = self.norm_q.weight, self.norm_k.weight
            if shards is not None:
                qkv, sums, *weights = shards.raw_to_heads(qkv, sums, *weights)
            turn = angles.cos(), angles.sin()
            settings = self.norm_q.eps, *turn, *self._projection(), topk, precision, quantized
            out = sla_from_qkv(qkv, sums, *weights, *settings)
            if isinstance(out, tuple):
                return out if shards is None else shards.to_tokens_int8(*out)
            return out.flatten(2) if shards is None else shards.to_tokens(out.flatten(2))
        q, k, v = qkv
        angles = angles if shards is None else angles[shards.own]
        for x, norm in ((q, self.norm_q), (k, self.norm_k)):
            for part in token_slices(x):  # in place: no copies of q and k beside them
                x[:, part] = apply_rope(norm(x[:, part].flatten(2)).view_as(x[:, part]), angles[part])
        if shards is None:
            return _attend(q, k, v)
        return shards.to_tokens(_attend(*shards.to_heads(qkv)))

    def attend_text(self, q, project, bias=None, kept=None):
        """Cross-attention between the products, see fused.block. bias [B, keys] is added to the scores; kept: an empty
        list, which takes the keys and values, or the list that took them before."""
        heads = (self.num_heads, -1)
        pair = kept[0] if kept else None
        if pair is None:
            k, v = project()
            pair = self.norm_k(k).unflatten(-1, heads), v.unflatten(-1, heads)
            if kept is not None:
                kept.append(pair)
        return _attend(self.norm_q(q).unflatten(-1, heads), *pair, bias, self.keeps_scores)


class CrossAttention(Attention):
    """Attention to the text, dense."""

    def forward(self, x, context, bias=None, kept=None):
        """x [B, L, dim]; context [B, keys, dim]; bias and kept: see attend_text."""
        return self.o(self.attend_text(self.q(x), lambda: (self.k(context), self.v(context)), bias, kept))


def _attend(q, k, v, bias=None, keeps_scores=False):
    """Dense attention of [B, L, H, D] -> [B, L, H * D]; bias [B, keys] is added to the scores. keeps_scores: see
    Attention."""
    bias = None if bias is None else bias[:, None, None].to(q.dtype)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    small = q.device.type == "cpu" and q.shape[:3].numel() * k.shape[2] <= _SCORES
    attend = _products if keeps_scores and small else F.scaled_dot_product_attention
    return attend(q, k, v, bias).transpose(1, 2).flatten(2)


def _products(q, k, v, bias):
    """Attention of [B, H, L, D] by two products with all scores between them, which a backward pass finds again."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores if bias is None else scores + bias).softmax(-1) @ v


class Block(nn.Module):
    def __init__(self, dim, ffn_dim, num_heads, eps, sla):
        super().__init__()
        self.eps = eps
        self.self_attn = Attention(dim, num_heads, eps, sla)
        self.norm3 = nn.LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(dim, num_heads, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = new_modulation(6, dim)

    def forward(
        self, x, modulation, context, angles, topk=None, precision="bf16", context_bias=None, kept=None, shards=None
    ):
        """x [B, L, dim]; modulation float32 [B, 6, dim]; context [B, keys, dim]; context_bias [B, keys] or None; kept:
        None, or a list that holds the text's keys and values from step to step. shards: None, or how x lies in several
        processes (turbo_core.parallel.Shards); x is then this process's part of it, angles are of all tokens."""
        modulation = (self.modulation.float() + modulation).chunk(6, 1)
        runs_fused = fused.pays(x.device) and self.is_int8()
        if runs_fused and not learning(x, context, *modulation, *self.parameters()):
            return self.fused(x, modulation, context, angles, topk, precision, context_bias, kept, shards)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation

        def modulated(x, shift, scale):
            return by_slices(lambda x: torch.addcmul(shift, layer_norm(x, self.eps), 1 + scale).to(x.dtype), x)

        def normed(x):
            return layer_norm(x, self.eps, self.norm3.weight, self.norm3.bias).to(x.dtype)

        attend = functools.partial(self.self_attn, angles=angles, topk=topk, precision=precision, shards=shards)
        x = torch.addcmul(x, attend(modulated(x, shift1, scale1)), gate1.to(x.dtype))
        x = x + self.cross_attn(by_slices(normed, x), context, context_bias, kept)
        y = modulated(x, shift2, scale2)
        y = by_slices(self.ffn, y.view(1, -1, y.shape[-1])).view_as(x)  # one batch: int8 blocks run through samples
        return torch.addcmul(x, y, gate2.to(x.dtype))

    def is_int8(self) -> bool:
        """True where the ten linears are int8 in one format, and nothing is added beside them."""
        layers = [self.get_submodule(name) for name in QUANTIZED_LINEARS]
        return all(isinstance(layer, Int8Linear) and not layer.beside for layer in layers) and (
            len({is_row_scale(layer.weight, layer.weight_scale) for layer in layers}) == 1
        )

    def fused(
        self, x, modulation, context, angles, topk=None, precision="bf16", context_bias=None, kept=None, shards=None
    ):
        """The same by fused.block; modulation: six float32 [B, 1, dim]."""

        def borrow(*names):
            layers = [self.get_submodule(name) for name in names]
            return contextlib.nullcontext([(layer.weight, layer.weight_scale, layer.bias) for layer in layers])

        settings = {"angles": angles, "topk": topk, "precision": precision, "shards": shards}
        attend = functools.partial(self.self_attn.attend_self, **settings)
        attend_text = functools.partial(self.cross_attn.attend_text, bias=context_bias, kept=kept)
        heads, norm3 = self.self_attn.num_heads, (self.norm3.weight, self.norm3.bias)
        modulation = [part.flatten(0, 1) for part in modulation]
        return fused.block(x, context, modulation, borrow, attend, attend_text, norm3, heads, self.eps)
