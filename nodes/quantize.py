"""QuantizeW8A8: any Wan MODEL with int8 linears."""

import logging

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.ldm.wan.model import WanModel
from comfy.quant_ops import QuantizedTensor
from comfy_api.latest import io

from ..turbo_core import layout
from ..turbo_core.errors import TurboError
from ..turbo_core.int8 import quantize_block, quantize_rows
from ..turbo_core.wan import QUANTIZED_LINEARS
from .block_list import parse_blocks
from .ops import quant_entry, quantized_ops

FORMATS = {"block (TurboWan)": quantize_block, "row (ComfyUI native)": quantize_rows}
LAYOUTS = {quantize_block: layout.NAME, quantize_rows: "TensorWiseINT8Layout"}
LAYERS = {
    "all": QUANTIZED_LINEARS,
    "feed-forward": ("ffn.0", "ffn.2"),
    "attention": tuple(name for name in QUANTIZED_LINEARS if "attn" in name),
}


def _patched_weight(patcher, key):
    """The weight as this MODEL sees it: original, in float, with its LoRAs baked in. Also when it is loaded."""
    weight = patcher.backup[key].weight if key in patcher.backup else comfy.utils.get_attr(patcher.model, key)
    device = comfy.model_management.get_torch_device()
    weight = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
    if key in patcher.patches:
        return comfy.lora.calculate_weight(patcher.patches[key], weight.to(device, torch.float32, copy=True), key)
    return weight.to(device)


def quantized_state_dict(patcher, quantize, layers):
    """State dict of the diffusion model with the named layers ("blocks.0.ffn.0", ...) as int8."""
    prefix = "diffusion_model."
    sd = patcher.model.diffusion_model.state_dict()
    baked = {key for key in (*patcher.patches, *patcher.backup) if key.startswith(prefix)}
    for key in baked - {f"{prefix}{layer}.weight" for layer in layers}:
        name = key.removeprefix(prefix)
        for extra in ("weight_scale", "weight_scale_2", "comfy_quant", "input_scale"):
            sd.pop(name.removesuffix("weight") + extra, None)
        sd[name] = _patched_weight(patcher, key).to("cpu")
    progress = comfy.utils.ProgressBar(len(layers))
    for layer in layers:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update(1)
        key = f"{prefix}{layer}.weight"
        if key not in baked and getattr(comfy.utils.get_attr(patcher.model, key), "_layout_cls", "") == LAYOUTS[quantize]:
            continue  # in this format already: rounding it again would only lose
        weight = _patched_weight(patcher, key)
        if not torch.isfinite(weight).all():
            raise TurboError(f"{layer}.weight holds NaN or infinity, quantizing it would spread them: check the model.")
        weight_q, scale = (t.to("cpu") for t in quantize(weight))
        for key in [k for k in sd if k.startswith(f"{layer}.") and k != f"{layer}.bias"]:
            del sd[key]
        sd[f"{layer}.weight"], sd[f"{layer}.weight_scale"] = weight_q, scale
        sd[f"{layer}.comfy_quant"] = quant_entry(weight_q, scale)
    return sd


def quantize_patcher(patcher, quantize, layers, disable_dynamic=False):
    """A new, independent ModelPatcher with int8 layers and every setting of the old one; LoRAs are baked in."""
    sd = quantized_state_dict(patcher, quantize, layers)
    old = patcher.model.model_config
    config = object.__new__(type(old))  # copy.copy stumbles over the config's catch-all __getattr__
    config.__dict__.update(old.__dict__)
    config.custom_operations = quantized_ops(patcher.model.manual_cast_dtype or patcher.model.get_dtype())
    model = config.get_model(sd, "")
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    new = patcher_class(model, load_device=patcher.load_device, offload_device=patcher.offload_device)
    model.load_model_weights(sd, "", assign=new.is_dynamic())
    sigma_max = getattr(patcher.model.model_sampling, "rcm_sigma_max", None)
    if sigma_max is not None:
        model.model_sampling.rcm_sigma_max = sigma_max
    settings = patcher.clone()
    new.model_options = settings.model_options
    new.wrappers, new.callbacks, new.attachments = settings.wrappers, settings.callbacks, settings.attachments
    for key, patch in settings.object_patches.items():
        if key.startswith("diffusion_model."):
            logging.warning("TurboWan: QuantizeW8A8 drops the patch of %s, apply that node after it.", key)
        else:
            new.object_patches[key] = patch
    if patcher.cached_patcher_init is not None:
        new.cached_patcher_init = (_quantize_again, (patcher.cached_patcher_init, patcher.patches, quantize, layers))
    return new


def _quantize_again(source, patches, quantize, layers, disable_dynamic=False):
    patcher = source[0](*source[1], disable_dynamic=disable_dynamic)
    patcher.patches = patches
    return quantize_patcher(patcher, quantize, layers, disable_dynamic)


class QuantizeW8A8(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="QuantizeW8A8",
            display_name="Quantize W8A8",
            category="model/patch",
            description="Makes the linear layers of a Wan MODEL int8, weights and activations: half the memory. LoRAs "
            "applied before are baked in; LoRAs applied after work too. Files that are int8 already need no node.",
            search_aliases=["int8", "TurboWan", "quantize model"],
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input(
                    "format",
                    options=list(FORMATS),
                    tooltip="block: 128x128 blocks, as the published TurboWan files. row: one scale per row, which "
                    "ComfyUI can load by itself after saving; faster without a GPU.",
                ),
                io.Combo.Input("layers", options=list(LAYERS), advanced=True, tooltip="Which linear layers."),
                io.String.Input(
                    "skip_blocks",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip='Blocks that stay as they are, for example "0, 1, 38-39".',
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, format, layers="all", skip_blocks="") -> io.NodeOutput:
        network = model.model.diffusion_model
        if not isinstance(network, WanModel):
            raise TurboError(f"QuantizeW8A8 expects a Wan model, got {type(network).__name__}: connect a Wan MODEL.")
        skipped = parse_blocks(skip_blocks, len(network.blocks))
        blocks = [i for i in range(len(network.blocks)) if i not in skipped]
        names = [f"blocks.{i}.{name}" for i in blocks for name in LAYERS[layers]]
        return io.NodeOutput(quantize_patcher(model, FORMATS[format], names))


NODES = [QuantizeW8A8]
