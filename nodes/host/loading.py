"""A TurboWan file as a MODEL of the host."""

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

from ...turbo_core import checkpoint
from ...turbo_core.errors import TurboError
from ...turbo_core.schedule import default_sigma_max
from .blocks import SLAWanBlock
from .fused import FusedWanBlock
from .ops import quant_entry, quantized_ops

DTYPES = {"default": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# whose network is the host's plain WanModel, which takes a block class; others are built from blocks of their own
_PLAIN = (getattr(comfy.supported_models, name, None) for name in ("WAN21_T2V", "WAN21_I2V", "WAN22_T2V"))
PLAIN = tuple(filter(None, _PLAIN))  # a name that the host has no more costs the fused block, not the pack
SOURCE = "turbowan_source"  # attachment: the Description of the file a MODEL came from


def build_patcher(sd, description, dtype=None, disable_dynamic=False):
    """A ModelPatcher from a canonical state dict, after comfy.sd.load_diffusion_model_state_dict.

    Differs from it where TurboWan needs to: block class with proj_l, int8 blocks, sizes from the description.
    """
    management = comfy.model_management
    quantized = any(key.endswith(".weight_scale") for key in sd)
    for key in [k for k in sd if k.endswith(".weight_scale")]:
        layer = key.removesuffix("_scale")
        sd.setdefault(layer.removesuffix("weight") + "comfy_quant", quant_entry(sd[layer], sd[key]))
    parameters = comfy.utils.calculate_parameters(sd)
    config = comfy.model_detection.model_config_from_unet(sd, "", metadata=description.metadata)
    if config is None:
        raise TurboError(f"{description.path}: ComfyUI does not recognize this Wan variant. Update ComfyUI.")
    config.unet_config.update(num_heads=description.num_heads, text_dim=description.text_dim)
    if description.has_sla:
        config.unet_config["wan_attn_block_class"] = SLAWanBlock
    elif quantized and type(config) in PLAIN:
        config.unet_config["wan_attn_block_class"] = FusedWanBlock
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    supported = config.supported_inference_dtypes
    if dtype is None:
        # int8 files were made from bf16 weights: prefer bf16 where the card has it
        stored = torch.bfloat16 if quantized else comfy.utils.weight_dtype(sd)
        dtype = management.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=stored)
    manual_cast = management.unet_manual_cast(dtype, load_device, supported)
    config.set_inference_dtype(dtype, manual_cast, device=load_device)
    if quantized:
        config.custom_operations = quantized_ops(manual_cast or dtype)
    model = config.get_model(sd, "")
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = patcher_class(model, load_device=load_device, offload_device=offload_device)
    if not management.is_device_cpu(offload_device):
        model.to(offload_device)
    model.load_model_weights(sd, "", assign=patcher.is_dynamic())
    return patcher


def sigma_max_of(model):
    """Sigma of the first step that an rCM model with these input channels was distilled for."""
    return default_sigma_max(model.model_config.unet_config.get("in_dim"))


def mark_sigma_max(model):
    """Leave it where the scheduler of a plain KSampler finds it, which sees nothing but model_sampling."""
    model.model_sampling.rcm_sigma_max = sigma_max_of(model)


def _as_distilled(network, x, timestep, *args, **kwargs):
    """The timestep as the student saw it in training: rounded to bfloat16, 996 (988 at sigma_max 80), 932, 852, 608."""
    return network(x, timestep.to(torch.bfloat16).to(timestep.dtype), *args, **kwargs)


def load_turbo_model(path, dtype=None, disable_dynamic=False):
    """Load any supported file; the factory that the host calls again when it needs a fresh copy."""
    description = checkpoint.inspect(path)
    if description.has_sla or description.format == "int8_block" or description.container == "pth":
        sd, description = checkpoint.load(path)
        patcher = build_patcher(sd, description, dtype, disable_dynamic)
        if description.has_sla:
            patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "turbowan", _as_distilled)
    else:
        options = {} if dtype is None else {"dtype": dtype}
        patcher = comfy.sd.load_diffusion_model(path, model_options=options, disable_dynamic=disable_dynamic)
    mark_sigma_max(patcher.model)
    patcher.set_attachments(SOURCE, description)
    patcher.cached_patcher_init = (load_turbo_model, (path, dtype))
    return patcher
