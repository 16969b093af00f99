"""ComfyUI's Wan block with sparse-linear self-attention and its trained projection proj_l."""

import logging
import re

import comfy.ldm.wan.model as wan
import comfy.ops
import torch
from comfy.ldm.flux.math import apply_rope1
from comfy.patcher_extension import CallbacksMP

from ...turbo_core.sla import sla_from_qkv
from .fused import FusedWanBlock, copied, in_float32
from .settings import active_settings, attend, log_once

_KEY = "turbowan_blocks"
_REPLACED = re.compile(r"diffusion_model\.blocks\.(\d+)\.(?:self_attn\.|self_attn$|forward$).*")


def _matrix(linear, device):
    """Weight and bias of a linear layer whose forward another node has wrapped (a bypass LoRA), from what it does."""
    out = linear(torch.eye(linear.in_features + 1, linear.in_features, device=device))  # unit vectors, then zero
    return (out[:-1] - out[-1]).t(), out[-1]


class SLASelfAttention(wan.WanSelfAttention):
    """Wan self-attention with proj_l under the published name, so that it loads, moves, saves and takes LoRA."""

    def __init__(self, dim, num_heads, *args, operation_settings, **kwargs):
        super().__init__(dim, num_heads, *args, operation_settings=operation_settings, **kwargs)
        # proj_l stays float32 beside low-precision weights, so it takes the host's casting Linear in every case
        size, device = self.head_dim, operation_settings.get("device")
        proj_l = comfy.ops.manual_cast.Linear(size, size, device=device, dtype=torch.float32)
        self.attn_op = torch.nn.ModuleDict({"local_attn": torch.nn.ModuleDict({"proj_l": proj_l})})

    def forward(self, x, freqs, transformer_options={}, **more):  # noqa: B006 (the host's signature)
        if more:
            log_once(
                f"this ComfyUI hands self-attention {sorted(more)}, which TurboWan does not know: ComfyUI's own dense "
                "attention runs, without the trained branch. Update TurboWan."
            )
            return super().forward(x, freqs, transformer_options, **more)
        settings = active_settings(transformer_options, x.shape[1], self.head_dim)
        if settings is None:
            return super().forward(x, freqs, transformer_options)
        # q, k and v are gone by the time of the last product
        return self.o(self._attend(x, freqs, settings, transformer_options))

    def _attend(self, x, freqs, settings, transformer_options):
        heads = (self.num_heads, self.head_dim)
        q = apply_rope1(self.norm_q(self.q(x)).unflatten(-1, heads), freqs)
        k = apply_rope1(self.norm_k(self.k(x)).unflatten(-1, heads), freqs)
        v = self.v(x).unflatten(-1, heads)

        def attended(weight, bias):
            return attend(q, k, v, weight, bias, settings)

        out = self.with_projection(attended, settings, x.device).flatten(2)
        for patch in transformer_options.get("patches", {}).get("attn1_patch", ()):
            out = patch({"x": out, "q": q, "k": k, "transformer_options": transformer_options})
        return out

    def with_projection(self, attended, settings, device):
        """attended(weight, bias) with those of proj_l, or with None where the mode leaves the linear branch out."""
        proj_l = self.attn_op["local_attn"]["proj_l"]
        if settings["mode"] == "sparse":
            return attended(None, None)
        if getattr(proj_l.forward, "__func__", None) is not type(proj_l).forward:
            return attended(*_matrix(proj_l, device))
        with in_float32(proj_l, device) as (weight, bias):
            return attended(weight, bias)

    def attend_qkv(self, qkv, sums, quantized, freqs, settings):
        """The same on q, k, v [3, B, L, dim] as they leave their linears, see turbo_core.wan.fused.block."""
        qkv = qkv.unflatten(-1, (self.num_heads, self.head_dim))
        cos, sin = (part.contiguous() for part in freqs[0, :, 0, :, :, 0].float().unbind(-1))
        norms = [copied(norm, qkv.device)[0] for norm in (self.norm_q, self.norm_k)]

        def attended(weight, bias):
            given = settings["topk"], settings["precision"], quantized, settings["coverage"]
            return sla_from_qkv(qkv, sums, *norms, self.eps, cos, sin, weight, bias, *given)

        out = self.with_projection(attended, settings, qkv.device)
        return out if isinstance(out, tuple) else out.flatten(2)


class SLAWanBlock(FusedWanBlock):
    """Handed to the host's WanModel as wan_attn_block_class."""

    self_attention = SLASelfAttention

    def __init__(self, cross_attn_type, dim, ffn_dim, num_heads, window_size, qk_norm, cross_attn_norm, eps, **kwargs):
        super().__init__(cross_attn_type, dim, ffn_dim, num_heads, window_size, qk_norm, cross_attn_norm, eps, **kwargs)
        self.self_attn = SLASelfAttention(dim, num_heads, window_size, qk_norm, eps, **kwargs)

    def attend(self, qkv, sums, quantized, freqs, transformer_options):
        settings = active_settings(transformer_options, qkv.shape[2], self.self_attn.head_dim)
        if settings is None:
            return super().attend(qkv, sums, quantized, freqs, transformer_options)
        return self.self_attn.attend_qkv(qkv, sums, quantized, freqs, settings)


def has_trained_sla(diffusion_model) -> bool:
    """True where the blocks carry proj_l (also when another copy of this pack built them)."""
    return hasattr(diffusion_model.blocks[0].self_attn, "attn_op")


def watch_replaced(patcher):
    """Say before each run that another node has put attention of its own in the place of the trained one."""
    patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, _KEY, _tell_replaced)


def _tell_replaced(patcher):
    found = {name: _REPLACED.fullmatch(name) for name in patcher.object_patches}
    blocks = sorted(int(match[1]) for match in found.values() if match)
    if not blocks:
        return
    theirs = patcher.object_patches[next(name for name, match in found.items() if match)]
    function = getattr(theirs, "__func__", theirs)
    who = getattr(function, "__qualname__", type(theirs).__qualname__)
    logging.warning(
        "TurboWan: %s (in %s) stands in the place of self-attention in %d blocks from block %d: there this model's "
        "trained linear branch does not run, nor Sparse Low-Bit Attention, and the video is another one. Leave that "
        "node out (Enhance-A-Video is such a node).",
        who, getattr(function, "__module__", type(theirs).__module__), len(blocks), blocks[0],
    )  # fmt: skip
