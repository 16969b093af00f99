"""ComfyUI's Wan block with sparse-linear self-attention and its trained projection proj_l."""

import logging

import comfy.ldm.wan.model as wan
import comfy.ops
import torch
from comfy.ldm.flux.math import apply_rope1

from ...turbo_core.errors import TurboError
from ...turbo_core.sla import HEAD_DIMS, sla_from_qkv, sparse_linear_attention
from .fused import FusedWanBlock, copied

OPTIONS = "turbowan_attention"  # key of the settings in transformer_options
DEFAULTS = {
    "mode": "sparse-linear",
    "topk": 0.1,
    "coverage": None,  # in place of topk, see turbo_core.sla
    "precision": "bf16",
    "sigma_start": None,  # None: no limit, and no comparison in the model's forward
    "sigma_end": None,
    "dense_blocks": frozenset(),
    "min_tokens": 0,
    "verbose": False,
}
_SIGMA = "turbowan_sigma"  # of one evaluation, in its options: (sigmas, the largest of them)
_logged = set()


def log_once(message):
    if message not in _logged:
        _logged.add(message)
        logging.info("TurboWan: %s", message)


def active_settings(transformer_options, tokens, head_dim, defaults=DEFAULTS):
    """The settings for this block and step, or None where attention is to be dense."""
    settings = transformer_options.get(OPTIONS, defaults)
    if settings is None or settings["mode"] == "dense":
        return None
    if head_dim not in HEAD_DIMS:
        log_once(f"dense attention, because head_dim {head_dim} is not 64 or 128")
        return None
    block = transformer_options.get("block_index")
    reason = None
    if block in settings["dense_blocks"]:
        reason = f"block {block} is in dense_blocks"
    elif tokens < settings["min_tokens"]:
        reason = f"{tokens} tokens are fewer than min_tokens {settings['min_tokens']}"
    elif settings["sigma_start"] is not None or settings["sigma_end"] is not None:
        sigma = _sigma(transformer_options)
        start, end = settings["sigma_start"], settings["sigma_end"]
        if (start is not None and sigma > start) or (end is not None and sigma < end):
            reason = f"sigma {sigma:.4f} is outside start_percent..end_percent"
    if reason is None:
        return settings
    if settings["verbose"]:
        log_once(f"dense attention where {reason}")
    return None


def _sigma(transformer_options):
    """The largest sigma of this evaluation, read from the device by its first block alone: each read waits for it."""
    sigmas = transformer_options["sigmas"]
    known = transformer_options.get(_SIGMA)
    if known is None or known[0] is not sigmas:
        known = transformer_options[_SIGMA] = sigmas, float(sigmas.max())
    return known[1]


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

    def forward(self, x, freqs, transformer_options={}):  # noqa: B006 (the host's signature)
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

        def attend(weight, bias):
            given = {"precision": settings["precision"], "coverage": settings.get("coverage")}
            return sparse_linear_attention(q, k, v, weight, bias, settings["topk"], **given)

        out = self.with_projection(attend, settings, x.device).flatten(2)
        for patch in transformer_options.get("patches", {}).get("attn1_patch", ()):
            out = patch({"x": out, "q": q, "k": k, "transformer_options": transformer_options})
        return out

    def with_projection(self, attend, settings, device):
        """attend(weight, bias) with those of proj_l, or with None where the mode leaves the linear branch out."""
        proj_l = self.attn_op["local_attn"]["proj_l"]
        if settings["mode"] == "sparse":
            return attend(None, None)
        if getattr(proj_l.forward, "__func__", None) is not type(proj_l).forward:
            return attend(*_matrix(proj_l, device))
        cast = {"dtype": torch.float32, "bias_dtype": torch.float32, "device": device, "offloadable": True}
        with comfy.ops.CastBiasWeightContext(proj_l, **cast) as (weight, bias):
            return attend(weight, bias)

    def attend_qkv(self, qkv, sums, quantized, freqs, settings):
        """The same on q, k, v [3, B, L, dim] as they leave their linears, see turbo_core.fused.block."""
        qkv = qkv.unflatten(-1, (self.num_heads, self.head_dim))
        cos, sin = (part.contiguous() for part in freqs[0, :, 0, :, :, 0].float().unbind(-1))
        norms = [copied(norm, qkv.device)[0] for norm in (self.norm_q, self.norm_k)]

        def attend(weight, bias):
            given = settings["topk"], settings["precision"], quantized, settings.get("coverage")
            return sla_from_qkv(qkv, sums, *norms, self.eps, cos, sin, weight, bias, *given)

        out = self.with_projection(attend, settings, qkv.device)
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


def network_of(model, node) -> torch.nn.Module:
    """The network of any MODEL. Raises TurboError naming the node where there is none."""
    network = getattr(getattr(model, "model", None), "diffusion_model", None)
    if network is None:
        raise TurboError(f"{node} got no MODEL but {type(model).__name__}: connect one, from Turbo Loader for example.")
    return network


def wan_network(model, node, otherwise="") -> wan.WanModel:
    """The network of a Wan MODEL. Raises TurboError naming the node, and another way out, for any other."""
    network = network_of(model, node)
    if not isinstance(network, wan.WanModel):
        cure = ", ".join(filter(None, ["connect a Wan MODEL", otherwise]))
        raise TurboError(f"{node} expects a Wan model, got {type(network).__name__}: {cure}.")
    return network


def has_trained_sla(diffusion_model) -> bool:
    """True where the blocks carry proj_l (also when another copy of this pack built them)."""
    return hasattr(diffusion_model.blocks[0].self_attn, "attn_op")
