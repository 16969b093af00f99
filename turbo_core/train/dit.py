"""Wan's transformer as a network that can be trained: the parameters of wan.WanModel, operations with gradients.

wan.WanModel is built for running: kernels and slices without a backward pass. This one computes the same numbers.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..checkpoint.names import PROJ_L
from ..pipeline.text import TEXT_LENGTH
from ..rope import rope_angles
from ..sla import block_map
from ..wan import Block, WanModel, timestep_embedding

_BLOCK_Q, _BLOCK_K = 128, 64


class TrainBlock(Block):
    """A block of WanModel with a backward pass, see TrainWan."""

    def forward(self, x, modulation, context, pads, rope, topk=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + modulation).to(x.dtype).chunk(6, 1)
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale1) + shift1
        x = x + gate1 * _self_attention(self.self_attn, y, rope, topk)
        y = F.layer_norm(x, x.shape[-1:], self.norm3.weight, self.norm3.bias, self.eps)
        x = x + _cross_attention(self.cross_attn, y, context, pads)
        y = F.layer_norm(x, x.shape[-1:], eps=self.eps) * (1 + scale2) + shift2
        return x + gate2 * self.ffn(y)


class TrainWan(WanModel):
    """WanModel for training. from_state_dict and state_dict are the same, so are the velocities.

    Two things make it cheaper: context comes without its padding (a prompt is padded with zeros to 512 tokens; all of
    those are the same key, which is attended to once, with the logarithm of their number added to its score), and
    a subset of the latent frames can be given, with their own places in time.
    """

    def __init__(self, dim, ffn_dim, num_heads, num_layers, *args, eps=1e-6, sla=False, **sizes):
        super().__init__(dim, ffn_dim, num_heads, num_layers, *args, eps=eps, sla=sla, **sizes)
        self.blocks = torch.nn.ModuleList(TrainBlock(dim, ffn_dim, num_heads, eps, sla) for _ in range(num_layers))
        self.checkpointing = False  # recompute each block in the backward pass: less memory, a third more time

    def forward(self, x, timestep, context, lengths, y=None, topk=None, frames=None):
        """Velocity like x [B, 16, T, H, W] at timestep [B] (0 to 1000).

        context [B, tokens, text_dim], of which lengths [B] are a prompt's; what follows is ignored. y: as in WanModel.
        topk None is dense. frames: int64 [T], places in time of x's latent frames, default 0 to T - 1.
        """
        out_dtype = x.dtype
        tokens = self.patch_embedding(x if y is None else torch.cat([x, y.to(x)], 1))
        t, h, w = tokens.shape[2:]
        tokens = tokens.flatten(2).transpose(1, 2)
        time = self.time_embedding(timestep_embedding(timestep, self.freq_dim))
        modulation = self.time_projection(time).unflatten(1, (6, self.dim)).float()
        context, pads = _with_pad(context, lengths)
        context = self.text_embedding(context)
        frames = torch.arange(t, device=x.device) if frames is None else frames
        rope = rope_angles((int(frames.max()) + 1, h, w), self.dim // self.num_heads, x.device)
        rope = rope.unflatten(0, (-1, h * w))[frames].flatten(0, 1)
        rope = rope.cos()[:, None], rope.sin()[:, None]
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, modulation, context, pads, rope, topk, use_reentrant=False)
            else:
                tokens = block(tokens, modulation, context, pads, rope, topk)
        shift, scale = (self.head.modulation.float() + time.float()[:, None]).to(tokens.dtype).chunk(2, 1)
        out = self.head.head(F.layer_norm(tokens, tokens.shape[-1:], eps=self.head.eps) * (1 + scale) + shift)
        out = out.view(len(x), t, h, w, 1, 2, 2, self.out_dim).permute(0, 7, 1, 4, 2, 5, 3, 6)
        return out.reshape(len(x), self.out_dim, t, h * 2, w * 2).to(out_dtype)


def trainable(state: dict, num_heads=None, device="cpu", sla=False) -> TrainWan:
    """A TrainWan in float32 with the weights of a canonical state dict; sla adds proj_l, all zeros, where it lacks."""
    model = TrainWan.from_state_dict(state, torch.float32, device, num_heads)
    if sla and not model.has_sla:
        num_heads = model.num_heads
        state = dict(state)
        size = model.dim // num_heads
        for index in range(len(model.blocks)):
            proj_l = f"blocks.{index}.self_attn.attn_op.local_attn.proj_l"
            state |= {f"{proj_l}.weight": torch.zeros(size, size), f"{proj_l}.bias": torch.zeros(size)}
        model = TrainWan.from_state_dict(state, torch.float32, device, num_heads)
    # the weights are mapped to their file: copies may be written to
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.train().requires_grad_(True)


def train_dense(model: torch.nn.Module) -> None:
    """Leave proj_l alone: dense attention does not use it, and processes wait for every gradient that is due."""
    for name, parameter in model.named_parameters():
        if PROJ_L in name:
            parameter.requires_grad_(False)


def _with_pad(context, lengths):
    """(context with one row of zeros after each prompt, what is added to the score of each key [B, 1, 1, keys])."""
    longest = int(lengths.max())
    context = F.pad(context[:, :longest], (0, 0, 0, 1))
    place = torch.arange(longest + 1, device=context.device)
    lengths = lengths[:, None].to(context.device)
    count = (TEXT_LENGTH - lengths).clamp_min(1).log()
    score = torch.where(place < lengths, 0.0, torch.where(place == lengths, count, -torch.inf))
    return context * (place < lengths)[..., None], score[:, None, None, :]


def _heads(attention, x):
    return x.unflatten(-1, (attention.num_heads, -1))


def _rms_norm(norm, x):
    return F.rms_norm(x, norm.weight.shape, norm.weight.to(x.dtype), norm.eps)


def _rotate(x, rope):
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def _cross_attention(attention, x, context, pads):
    q = _heads(attention, _rms_norm(attention.norm_q, attention.q(x))).transpose(1, 2)
    k = _heads(attention, _rms_norm(attention.norm_k, attention.k(context))).transpose(1, 2)
    v = _heads(attention, attention.v(context)).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, pads.to(q.dtype))
    return attention.o(out.transpose(1, 2).flatten(2))


def _self_attention(attention, x, rope, topk):
    q = _rotate(_heads(attention, _rms_norm(attention.norm_q, attention.q(x))), rope)
    k = _rotate(_heads(attention, _rms_norm(attention.norm_k, attention.k(x))), rope)
    v = _heads(attention, attention.v(x))
    if topk is None:
        out = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)
    else:
        out = sparse_linear(q, k, v, attention.proj_l.weight, attention.proj_l.bias, topk)
    return attention.o(out.flatten(2))


def sparse_linear(q, k, v, proj_weight, proj_bias, topk: float):
    """sla.sparse_linear_attention with a backward pass, q, k, v [B, L, H, D]; the block map has no gradient."""
    b, length, h, d = q.shape
    with torch.no_grad():
        index = block_map(q, k, topk, _BLOCK_Q, _BLOCK_K).long()  # [B, H, q blocks, kept]
    blocks = index.shape[2]
    padded = [F.pad(x, (0, 0, 0, 0, 0, -length % size)) for x, size in ((q, _BLOCK_Q), (k, _BLOCK_K), (v, _BLOCK_K))]
    qb, kb, vb = (
        x.permute(0, 2, 1, 3).reshape(b, h, -1, size, d) for x, size in zip(padded, (_BLOCK_Q, _BLOCK_K, _BLOCK_K))
    )
    batch = torch.arange(b, device=q.device)[:, None, None, None], torch.arange(h, device=q.device)[:, None, None]
    kb, vb = (x[(*batch, index)].flatten(3, 4) for x in (kb, vb))  # [B, H, q blocks, kept * 64, D]
    there = index[..., None] * _BLOCK_K + torch.arange(_BLOCK_K, device=q.device) < length
    flat = (x.flatten(0, 2)[:, None] for x in (qb, kb, vb))
    out = F.scaled_dot_product_attention(*flat, there.reshape(b * h * blocks, 1, 1, -1))
    out = out.view(b, h, blocks * _BLOCK_Q, d)[:, :, :length].transpose(1, 2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    cq, ck = q.softmax(-1), k.softmax(-1)
    linear = cq @ (ck.transpose(-1, -2) @ v) / (1e-5 + cq @ ck.sum(2).unsqueeze(-1))
    return out + F.linear(linear.transpose(1, 2), proj_weight.to(v.dtype), proj_bias.to(v.dtype))
