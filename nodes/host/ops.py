"""ComfyUI linear layers that hold block-int8 weights, beside every format the host knows itself.

They are called as hosts of any age call linears: newer ones with an activation before the product, a sum after it.
"""

import importlib
import inspect
import json

import comfy.hooks
import comfy.model_management
import comfy.ops
import torch
from comfy.patcher_extension import CallbacksMP
from comfy.quant_ops import QUANT_ALGOS

from ...turbo_core.errors import TurboError
from ...turbo_core.int8 import block_scale_shape, int8_linear, is_row_scale, layout
from ...turbo_core.int8.layout import activated, added
from .settings import log_once

ROW = "TensorWiseINT8Layout"  # the host's own layout, whose scales are one a row here
EXTRAS = ("input_act", "act_weight", "residual", "residual_scale")  # what follows the input, in this order

QUANT_ALGOS[layout.FORMAT] = {
    "storage_t": torch.int8,
    "parameters": {"weight_scale"},
    "comfy_tensor_layout": layout.NAME,
    "quantize_input": False,
}


def quant_entry(weight_q, scale):
    """The comfy_quant entry (JSON as uint8) that names the format of an int8 weight."""
    name = "int8_tensorwise" if is_row_scale(weight_q, scale) else layout.FORMAT
    return torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)


def _disabled():
    """Formats that the device cannot multiply, which the host computes in full precision. Newer hosts tell them."""
    device, management = comfy.model_management.get_torch_device(), comfy.model_management
    ask = getattr(comfy.ops, "get_disabled_quant_formats", None)
    if ask is not None:
        return ask(device)
    kinds = {
        "fp8": ("float8_e4m3fn", "float8_e5m2"),
        "nvfp4": ("nvfp4",),
        "mxfp8": ("mxfp8",),
    }
    return {name for kind, names in kinds.items() if not _computes(management, kind, device) for name in names}


def _computes(management, kind, device):
    supports = getattr(management, f"supports_{kind}_compute", None)
    return supports is None or supports(device)


def quantized_ops(compute_dtype):
    """The host's mixed-precision operations, whose Linear also loads, runs and saves the block format.

    The host's own loader raises on formats it does not list, hence the branch in _load_from_state_dict; F.linear on
    a quantized weight reaches the layout only under inference_mode, hence the direct call in _forward.
    """
    base = comfy.ops.mixed_precision_ops({}, compute_dtype, disabled=_disabled())
    known = names_in(base.Linear.forward)

    class Linear(base.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            entry = state_dict.get(f"{prefix}comfy_quant")
            if entry is None or json.loads(entry.numpy().tobytes()).get("format") != layout.FORMAT:
                return super()._load_from_state_dict(state_dict, prefix, *args)
            state_dict.pop(f"{prefix}comfy_quant")
            weight, scale = state_dict.pop(f"{prefix}weight"), state_dict.pop(f"{prefix}weight_scale")
            expected = block_scale_shape(*self._orig_shape)
            if weight.shape != self._orig_shape or scale.shape != expected:
                raise TurboError(
                    f"{prefix[:-1]}: expected int8 {list(self._orig_shape)} with scales {list(expected)}, got "
                    f"{list(weight.shape)} with {list(scale.shape)}: the file is damaged, download or convert it again."
                )
            self.quant_format, self.layout_type = layout.FORMAT, layout.NAME
            device = self.factory_kwargs["device"]
            quantized = layout.wrap(weight.to(device), scale.to(device, torch.float32), self.factory_kwargs["dtype"])
            self.weight = torch.nn.Parameter(quantized, requires_grad=False)
            missing = args[2]
            torch.nn.Module._load_from_state_dict(self, state_dict, prefix, *args)
            if f"{prefix}weight" in missing:
                missing.remove(f"{prefix}weight")

        # what state_dict writes beside the weight can be asked for by name, as nodes that merge models and hooks do
        @property
        def weight_scale(self):
            return self._written("weight_scale")

        @property
        def comfy_quant(self):
            return self._written("comfy_quant")

        def _written(self, name):
            try:
                return self.state_dict()[name]
            except KeyError:
                raise AttributeError(name) from None

        def forward(self, input, *given, **named):
            return call_linear(super().forward, known, input, *given, **named)

        def _forward(self, input, weight, bias, *given, **named):
            if layout.is_block(weight):
                if not given and not named:
                    return int8_linear(input, *weight.layout_cls.get_plain_tensors(weight), bias)
                weight = weight.dequantize()  # for what a newer host wants of it
            return super()._forward(input, weight, bias, *given, **named)

    class TurboOps(base):
        pass

    TurboOps.Linear = Linear
    return TurboOps


def refuse_weight_hooks(patcher):
    """Tell of a LoRA hook before a run: the host changes no quantized weight between steps, which it would find out in
    the middle."""
    patcher.add_callback_with_key(CallbacksMP.ON_REGISTER_ALL_HOOK_PATCHES, "turbowan", _check_hooks)


def _check_hooks(patcher, hooks, *_):
    if hooks.get_type(comfy.hooks.EnumHookType.Weight):
        raise TurboError(
            "A LoRA by a hook (Create Hook LoRA, keyframes) cannot change int8 weights between steps. Load the "
            "unquantized file, or put the LoRA on the MODEL by a LoRA loader."
        )


def part_of_host(module, name):
    """comfy.`module`.`name`, or None where this host has no such module or name: newer ones have more."""
    try:
        return getattr(importlib.import_module(f"comfy.{module}"), name, None)
    except ModuleNotFoundError:
        return None


def names_in(function) -> frozenset:
    """The names in a signature; a host that hands linears more than their input has them there."""
    return frozenset(inspect.signature(function).parameters)


def takes_activation() -> bool:
    """True where the host hands Wan's ffn.2 the activation before it, so that its hooks see what comes before that."""
    return "input_act" in names_in(comfy.ops.disable_weight_init.Linear.forward)


def call_linear(forward, known, input, *given, **named):
    """The host's bound forward(input, ...): what is not among the names known to it is computed around it.

    A keyword of a newer host that nobody here knows goes to the host's forward, said once in the log. Raises
    TurboError for an activation that neither knows: without it the result would be another one.
    """
    extras = {**dict(zip(EXTRAS, given)), **named}
    extras = {name: value for name, value in extras.items() if value is not None}
    if not extras:
        return forward(input)
    unknown = len(given) > len(EXTRAS) or extras.keys() - EXTRAS
    if unknown:
        log_once(f"this ComfyUI hands linear layers {sorted(extras)}: more than TurboWan knows, its own forward runs")
    if unknown or extras.keys() <= known:
        return forward(input, *given, **named)
    act, weight = extras.get("input_act"), extras.get("act_weight")
    if act == "rms_norm" and isinstance(weight, torch.nn.Module):
        x = weight(input)  # a norm of the host, whose weight may lie elsewhere
    else:
        x = activated(input, act, weight)
    if x is NotImplemented:
        raise TurboError(
            f"a linear layer is to apply the activation {act!r}, which this ComfyUI lacks: update ComfyUI."
        )
    return added(forward(x), extras.get("residual"), extras.get("residual_scale"))
