"""ComfyUI's Wan block over turbo_core.wan.fused, where its ten linears are int8 and nobody has a hand in between.

The host keeps its weights: they are borrowed layer by layer through its casting contexts, so that offload, lowvram and
dynamic VRAM work as in its own Linear. Attention goes through the host's attention call, overrides included.
"""

import contextlib

import comfy.ldm.wan.model as wan
import comfy.model_management
import comfy.ops
import torch
import torch.nn.functional as F
from comfy.ldm.flux.math import apply_rope1
from comfy.ldm.modules.attention import optimized_attention
from comfy.quant_ops import QuantizedTensor

from ...turbo_core.dispatch import FLOATS, learning
from ...turbo_core.int8 import is_row_scale, layout
from ...turbo_core.wan import QUANTIZED_LINEARS, token_slices
from ...turbo_core.wan import fused as wan_fused
from .ops import ROW, part_of_host
from .settings import log_once

BETWEEN = ("attn1_patch", "attn2_patch")  # patches that want what the fused block does not make


def _untouched(module) -> bool:
    """True where the module's own forward runs and nothing else: no bypass, no hook. One that was taken off again
    leaves the module's own method in its dictionary."""
    own = getattr(module.forward, "__func__", None) is type(module).forward
    return own and not module._forward_hooks and not module._forward_pre_hooks


def quantized_as(layer, device):
    """ "row", "block" or None for a linear that only its own forward can compute."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, QuantizedTensor) or getattr(weight._params, "transposed", False):
        return None
    changed = layer.weight_function or layer.bias_function or layer._full_precision_mm
    changed = changed or getattr(layer, "comfy_force_cast_weights", False) or getattr(weight._params, "convrot", False)
    scaled = getattr(layer, "pre_quant_scale", None) is not None or getattr(layer, "input_scale", None) is not None
    if changed or scaled or (hasattr(layer, "_v") and comfy.model_management.is_device_cpu(device)):
        return None
    if weight._layout_cls == layout.NAME:
        return "block"
    scale = weight._params.scale
    return "row" if weight._layout_cls == ROW and scale.ndim == 2 and is_row_scale(weight._qdata, scale) else None


def may_fuse(block, x, e, freqs, context, transformer_options) -> bool:
    """False where the fused block cannot compute this, as far as torch.compile watches what it depends on."""
    training = comfy.model_management.in_training or learning(x, e, context)
    if x.dtype not in FLOATS or training or any(transformer_options.get("patches", {}).get(p) for p in BETWEEN):
        return False
    if not has_own_parts(block):
        return False
    if e.shape[0] != x.shape[0] or (e.ndim == 4 and x.shape[1] % e.shape[1]):
        return False  # a timestep for each frame, and tokens that do not divide into frames
    if tuple(freqs.shape[:3]) != (1, x.shape[1], 1):
        return False
    layers = [block.get_submodule(name) for name in QUANTIZED_LINEARS]
    return all(isinstance(getattr(layer, "weight", None), QuantizedTensor) for layer in layers)


def has_own_parts(block) -> bool:
    """False for image keys among others, and without the norms that Wan has."""
    parts = (block.self_attn, block.cross_attn, block.ffn)
    own = tuple(map(type, parts)) == (block.self_attention, wan.WanT2VCrossAttention, FeedForward)
    return bool(own and block.qk_norm and block.cross_attn_norm)


def can_fuse(block, x) -> bool:
    """True where may_fuse was and the fused block computes what the block's own forward would."""
    if not all(map(_untouched, block.modules())):
        return False
    formats = {quantized_as(block.get_submodule(name), x.device) for name in QUANTIZED_LINEARS}
    return len(formats) == 1 and None not in formats


def _stays(layer, weight) -> bool:
    """True where a borrowed weight lies in memory of its own, not in a buffer that the next layer is fetched into."""
    return weight is layer.weight or weight is getattr(layer, "_v_weight", None)


@contextlib.contextmanager
def borrowed(layers, dtype, device):
    """[(int8 weight, scale, bias), ...] of the host's linears on the device, for as long as it is open."""
    with contextlib.ExitStack() as open_contexts:
        triples = []
        for layer in layers:
            comfy.ops.run_every_op()  # interrupts
            # as the host's Linear does for a layer whose input it does not quantize: the weight stays int8
            cast = {"dtype": layer.weight.dtype, "bias_dtype": dtype, "compute_dtype": dtype, "want_requant": True}
            context = comfy.ops.CastBiasWeightContext(layer, device=device, offloadable=True, **cast)
            weight, bias = open_contexts.enter_context(context)
            assert isinstance(weight, QuantizedTensor), type(weight)
            weight_q, scale = weight.layout_cls.get_plain_tensors(weight)
            triple = (weight_q, scale.float(), bias)
            if len(layers) > 1 and not _stays(layer, weight):
                triple = tuple(None if t is None else t.clone() for t in triple)
            triples.append(triple)
        yield triples


def may_record() -> bool:
    """True for hosts that may record what a block allocates, to hand the same memory out at the next step."""
    return part_of_host("model_prefetch", "pause_malloc_graph") is not None


def attention_call(part, transformer_options):
    """Arguments of the host's attention call for an attention module, with what a file or a node prefers there."""
    call = {"heads": part.num_heads, "transformer_options": transformer_options}
    preferred = getattr(part, "comfy_attention", None)  # newer hosts have it
    return call if preferred is None else call | {"preferred_attention": preferred}


def in_float32(module, device):
    """The host's context that lends (weight, bias) of a module in float32 on the device."""
    dtypes = {"dtype": torch.float32, "bias_dtype": torch.float32}
    return comfy.ops.CastBiasWeightContext(module, device=device, offloadable=True, **dtypes)


def copied(module, device):
    """(weight, bias) of a norm in float32: a few kilobytes, and its buffer is free for the next layer at once."""
    with in_float32(module, device) as tensors:
        return tuple(None if t is None else t.to(torch.float32, copy=True) for t in tensors)


class FeedForward(wan.WanFeedForward):
    """The host's, which hands the GELU to its second linear or past that linear's forward to a kernel of its own.

    Whoever replaces or hooks that forward, as a bypass LoRA does, is to see what comes after the GELU.
    """

    def forward(self, x):
        if _untouched(self[2]):
            return super().forward(x)
        return self[2](F.gelu(self[0](x), approximate="tanh"))


def guard_feed_forward(network):
    """Our feed-forward class for a stock network: the same, but for a last linear that somebody has in hand.

    There a bypass LoRA would take what comes before the GELU for what comes after it, on hosts that hand the linear its
    activation; on older ones it would be left out where rows are int8.
    """
    for module in network.modules():
        if type(module) is wan.WanFeedForward:
            module.__class__ = FeedForward


class FusedWanBlock(wan.WanAttentionBlock):
    """Handed to the host's WanModel as wan_attn_block_class."""

    self_attention = wan.WanSelfAttention

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ffn = FeedForward(*self.ffn)

    def forward(self, x, e, freqs, context, context_img_len=257, transformer_options={}, **more):  # noqa: B006 (the host's)
        if more:
            log_once(
                f"this ComfyUI hands Wan's blocks {sorted(more)}, which TurboWan does not know: its own block runs"
            )
            return super().forward(x, e, freqs, context, context_img_len, transformer_options, **more)
        given = x, e, freqs, context, transformer_options
        out = self.fused(*given) if wan_fused.pays(x.device) and may_fuse(self, *given) else None
        return super().forward(x, e, freqs, context, context_img_len, transformer_options) if out is None else out

    @torch.compiler.disable
    def fused(self, x, e, freqs, context, transformer_options):
        """The block through turbo_core.wan.fused, or None where it has to be the host's way.

        A break in torch.compile's graph, and an error with fullgraph=True. It could be traced, but the compiler does
        not look again at hooks and replaced forwards: a bypass LoRA added later would be ignored. There is little to
        compile: it is kernels from end to end.
        """
        if not can_fuse(self, x):
            return None
        own = comfy.model_management.cast_to(self.modulation, dtype=x.dtype, device=x.device)
        e = (own + e).unsqueeze(1) if e.ndim < 4 else own.unsqueeze(0) + e  # [B, frames or 1, 6, dim]
        modulation = [part.flatten(0, 1).float() for part in e.unbind(2)]

        def borrow(*names):
            return borrowed([self.get_submodule(name) for name in names], x.dtype, x.device)

        def attend(qkv, sums, quantized):
            return self.attend(qkv, sums, quantized, freqs, transformer_options)

        def attend_text(q, project):
            part, (k, v) = self.cross_attn, project()
            q, k = part.norm_q(q), part.norm_k(k)
            return optimized_attention(q, k, v, **attention_call(part, transformer_options))

        norm3 = copied(self.norm3, x.device)
        parts = borrow, attend, attend_text, norm3, self.num_heads, self.eps
        # who stands between blocks may write to x past torch's count of writes, by x.data or a kernel
        between = transformer_options.get("patches_replace", {}).get("dit")
        return wan_fused.block(x, context, modulation, *parts, leave=not (between or may_record()))

    def attend(self, qkv, sums, quantized, freqs, transformer_options):
        """Self-attention between the products, see turbo_core.wan.fused.block: the host's dense one. Overwrites qkv."""
        part = self.self_attn
        q, k, v = qkv
        for x, norm in ((q, part.norm_q), (k, part.norm_k)):
            for tokens in token_slices(x):  # in place: no copies of q and k beside them
                some = x[:, tokens]
                some.copy_(apply_rope1(norm(some).unflatten(-1, (part.num_heads, -1)), freqs[:, tokens]).flatten(2))
        return optimized_attention(q, k, v, **attention_call(part, transformer_options))
