"""Tomorrow's calls on the host that is there: what ComfyUI has changed since 0.33 around the pack, in words of our own.

install() gives linears, Wan's attention and feed-forward part, the attention call, patchers and the operations of
quantized weights the conventions of 0.39, once in a process and before the pack is imported. `pytest --newer`, or
TURBOWAN_NEWER=1 in the environment, runs the host's tests so. Only tests that run the host in their own process see it.
"""

import functools
import inspect
import json

import torch
import torch.nn.functional as F

OVERRIDE, INSIDE = "optimized_attention_override", "_inside_attn_wrapper"


def install():
    """Give the host the calls of 0.39, where it has not got them itself."""
    import comfy.ops

    if "input_act" in inspect.signature(comfy.ops.disable_weight_init.Linear.forward).parameters:
        return
    _linears(comfy.ops)
    _attention()
    _wan()
    _patchers()


def _linears(ops):
    for kind in (ops.disable_weight_init, ops.fp8_ops):
        kind.Linear.forward = _with_extras(kind.Linear.forward)
    make = ops.mixed_precision_ops

    @functools.wraps(make)
    def mixed_precision_ops(*args, **kwargs):
        made = make(*args, **kwargs)
        made.Linear.forward = _with_extras(made.Linear.forward, ops.linear_input_act)
        return made

    def get_disabled_quant_formats(device=None):
        management = ops.comfy.model_management
        formats = {"nvfp4"} if not management.supports_nvfp4_compute(device) else set()
        formats |= {"mxfp8"} if not management.supports_mxfp8_compute(device) else set()
        fp8 = {"float8_e4m3fn", "float8_e5m2"}
        return formats if management.supports_fp8_compute(device) else formats | fp8

    ops.mixed_precision_ops = mixed_precision_ops
    ops.get_disabled_quant_formats = get_disabled_quant_formats


def _with_extras(plain, in_quantizer=None):
    """A forward with an activation before and a sum after it; in_quantizer does a GELU where rows are int8."""

    def forward(self, input, input_act=None, act_weight=None, residual=None, residual_scale=None):
        rows = getattr(self.weight, "_layout_cls", None) == "TensorWiseINT8Layout"
        if input_act == "gelu_tanh" and rows and in_quantizer is not None:
            out = in_quantizer(self, input, input_act)
        else:
            out = plain(self, _activated(input, input_act, act_weight))
        return out if residual is None else torch.addcmul(residual, out, residual_scale)

    return forward


def _activated(x, name, weight):
    if name is None:
        return x
    if name == "swiglu":
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up
    return {"gelu_tanh": lambda: F.gelu(x, approximate="tanh"), "rms_norm": lambda: weight(x)}[name]()


class ComfyAttention(torch.nn.Module):
    """What a file or a node prefers for one attention module: its config, and the function that it stands for."""

    def __init__(self):
        super().__init__()
        self.config = self.function = None

    def _load_from_state_dict(self, state_dict, prefix, *args):
        stored = state_dict.pop(f"{prefix}config", None)
        self.config = None if stored is None else json.loads(stored.numpy().tobytes())

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.config is not None:
            text = json.dumps(self.config).encode()
            destination[f"{prefix}config"] = torch.tensor(list(text), dtype=torch.uint8)


def _attention():
    """The attention call takes a preference, and asks it only where no override is set."""
    import comfy.ldm.modules.attention as attention

    plain = attention.optimized_attention

    @functools.wraps(plain)
    def call(*args, preferred_attention=None, **kwargs):
        overridden = INSIDE in kwargs or OVERRIDE in (kwargs.get("transformer_options") or {})
        if not overridden and preferred_attention is not None and preferred_attention.function is not None:
            return preferred_attention.function(*args, **kwargs)
        return plain(*args, **kwargs)

    attention.optimized_attention = attention.optimized_attention_masked = call


def _wan():
    import comfy.ldm.modules.attention as attention
    import comfy.ldm.wan.model as wan

    contain = attention.AttentionTensorContainer
    wan.optimized_attention = attention.optimized_attention
    begin = wan.WanSelfAttention.__init__

    @functools.wraps(begin)
    def __init__(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.comfy_attention = ComfyAttention()

    def attend(self, q, k, v, options):
        given = {"heads": self.num_heads, "preferred_attention": self.comfy_attention, "transformer_options": options}
        return wan.optimized_attention(q, k, v, **given)

    def self_attention(self, x, freqs, transformer_options={}):  # noqa: B006 (as the host has it)
        turned = lambda t: wan.apply_rope1(t.unflatten(-1, (self.num_heads, -1)), freqs)  # noqa: E731
        q, k = turned(self.norm_q(self.q(x))), turned(self.norm_k(self.k(x)))
        patches = transformer_options.get("patches", {}).get("attn1_patch", ())
        seen = (q, k) if patches else None
        contained = contain(q.flatten(2)), contain(k.flatten(2)), contain(self.v(x))
        del q, k
        out = attend(self, *contained, transformer_options)
        for patch in patches:
            out = patch({"x": out, "q": seen[0], "k": seen[1], "transformer_options": transformer_options})
        return self.o(out)

    def text_attention(self, x, context, transformer_options={}, **kwargs):  # noqa: B006
        contained = contain(self.norm_q(self.q(x))), contain(self.norm_k(self.k(context))), contain(self.v(context))
        return self.o(attend(self, *contained, transformer_options))

    wan.WanSelfAttention.__init__ = __init__
    wan.WanSelfAttention.forward, wan.WanT2VCrossAttention.forward = self_attention, text_attention
    wan.WanFeedForward.forward = lambda self, x: self[2](self[0](x), input_act="gelu_tanh")


def _patchers():
    """A patcher knows whether its weights are read again from a fast disk; its clones take that over."""
    import comfy.model_patcher
    import comfy.sd

    patcher = comfy.model_patcher.ModelPatcher
    clone, load = patcher.clone, comfy.sd.load_diffusion_model
    patcher.fast_disk = False

    @functools.wraps(clone)
    def clone_with_it(self, *args, **kwargs):
        new = clone(self, *args, **kwargs)
        new.fast_disk = self.fast_disk
        return new

    @functools.wraps(load)
    def load_from_disk(*args, **kwargs):
        new = load(*args, **kwargs)
        new.fast_disk = True
        return new

    patcher.clone, comfy.sd.load_diffusion_model = clone_with_it, load_from_disk
