"""Files as the host's MODEL and CLIP: any TurboWan or Wan model, umT5 in any size."""

import json
import logging
import os

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from comfy.patcher_extension import WrappersMP

from ...turbo_core import checkpoint
from ...turbo_core.checkpoint.names import looks_like
from ...turbo_core.checkpoint.others.comfyui import attention_tensors
from ...turbo_core.checkpoint.others.sharded import INDEX
from ...turbo_core.errors import TurboError, shown
from ...turbo_core.pipeline.text import check_encoder
from .blocks import SLAWanBlock, watch_replaced
from .files import read_tensors, stays_mapped
from .fused import FusedWanBlock, guard_feed_forward
from .kernels import prove_for
from .ops import names_in, part_of_host, quant_entry, quantized_ops, refuse_weight_hooks
from .schedule import mark_sigma_max
from .weights import with_rows

DTYPES = {"default": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# whose network is the host's plain WanModel, which takes a block class; others are built from blocks of their own
_PLAIN = (getattr(comfy.supported_models, name, None) for name in ("WAN21_T2V", "WAN21_I2V", "WAN22_T2V"))
PLAIN = tuple(filter(None, _PLAIN))  # a name that the host has no more costs the fused block, not the pack
SOURCE = "turbowan_source"  # attachment: the Description of the file a MODEL came from
TEXT_CONFIG = "umt5xxl_model_config"  # the host's name for sizes that may differ from umT5-xxl
_TEXT_SIZES = {  # {UMT5's: the host's}
    "vocabulary": "vocab_size",
    "width": "d_model",
    "ffn": "d_ff",
    "blocks": "num_layers",
    "heads": "num_heads",
    "head": "d_kv",
}
# what sets umT5 apart from other T5 files, and the tokenizer, which the host takes from the file as well
_OF_UMT5 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight", "spiece_model"


def build_patcher(sd, description, dtype=None, disable_dynamic=False):
    """A ModelPatcher from a canonical state dict, after comfy.sd.load_diffusion_model_state_dict.

    Differs from it where TurboWan needs to: block class with proj_l, int8 blocks, sizes from the description.
    """
    management = comfy.model_management
    quantized = any(key.endswith(".weight_scale") for key in sd)
    config = _config(sd, description, quantized)
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    supported = config.supported_inference_dtypes
    if dtype is None:
        # int8 files were made from bf16 weights: prefer bf16 where the card has it
        stored = torch.bfloat16 if quantized else comfy.utils.weight_dtype(sd)
        parameters = comfy.utils.calculate_parameters(sd)
        dtype = management.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=stored)
    manual_cast = management.unet_manual_cast(dtype, load_device, supported)
    config.set_inference_dtype(dtype, manual_cast, device=load_device)
    if quantized:
        config.custom_operations = quantized_ops(manual_cast or dtype)
    model = config.get_model(sd, "")
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    devices = {"load_device": load_device, "offload_device": offload_device}
    patcher = patcher_class(model, **devices, **_disk(patcher_class, sd))
    if quantized:
        refuse_weight_hooks(patcher)
    if not management.is_device_cpu(offload_device):
        model.to(offload_device)
    try:
        model.load_model_weights(sd, "", assign=patcher.is_dynamic())
    except RuntimeError as error:
        raise _misfit(description.path, error) from error
    if description.has_sla or quantized:
        prove_for(patcher)
    if description.has_sla:
        watch_replaced(patcher)
    return patcher


def _disk(patcher_class, sd):
    """What a newer host wants to know of a new patcher: whether it may read its weights from their file again.

    That is for tensors that the host has mapped itself, which it alone can tell.
    """
    ask = part_of_host("storage", "state_dict_fast_disk")
    return {"fast_disk": ask(sd)} if ask is not None and "fast_disk" in names_in(patcher_class.__init__) else {}


def _kind(metadata):
    """The words of a file by which the host tells kinds of Wan apart: not all can be read off the weights."""
    known = [
        k.unet_config.items() for k in comfy.supported_models.models if "wan" in str(k.unet_config.get("image_model"))
    ]
    try:
        said = json.loads(metadata.get("config", "{}"))["transformer"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: value for name, value in said if any((name, value) in items for items in known)}


def _config(sd, description, quantized):
    """The host's configuration of this model, with our block class. Completes sd with the names of int8 formats."""
    for key in [k for k in sd if k.endswith(".weight_scale")]:
        layer = key.removesuffix("_scale")
        sd.setdefault(layer.removesuffix("weight") + "comfy_quant", quant_entry(sd[layer], sd[key]))
    # the host takes any word of `config` for an argument of its network; what of it counts is in the description
    metadata = description.metadata | {"config": json.dumps({"transformer": _kind(description.metadata)})}
    config = comfy.model_detection.model_config_from_unet(sd, "", metadata=metadata)
    if config is None:
        raise TurboError(f"{description.path}: ComfyUI does not recognize this Wan variant. Update ComfyUI.")
    config.unet_config.update(num_heads=description.num_heads, text_dim=description.text_dim)
    if description.has_sla:
        config.unet_config["wan_attn_block_class"] = SLAWanBlock
    elif quantized and type(config) in PLAIN:
        config.unet_config["wan_attn_block_class"] = FusedWanBlock
    return config


def file_name(model):
    """Of the file that a MODEL came from; empty where the host's own loader made it."""
    source = model.get_attachment(SOURCE)
    if source is None:
        return ""
    folder, name = os.path.split(str(source.path))
    return os.path.basename(folder) if name.endswith(INDEX) else name  # every index has the same name


def _as_distilled(network, x, timestep, *args, **kwargs):
    """The timestep as the student saw it in training: rounded to bfloat16, 996 (988 at sigma_max 80), 932, 852, 608."""
    return network(x, timestep.to(torch.bfloat16).to(timestep.dtype), *args, **kwargs)


def load_turbo_model(path, dtype=None, disable_dynamic=False):
    """Load any supported file; the factory that the host calls again when it needs a fresh copy."""
    description = checkpoint.inspect(path)
    if is_ours(description):
        file = checkpoint.opened(path, writable=True)
        sd = checkpoint.weights(file, mapped=stays_mapped(file, disable_dynamic))
        patcher = build_patcher(sd | attention_tensors(description.attention), description, dtype, disable_dynamic)
        if description.has_sla:
            patcher.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "turbowan", _as_distilled)
    else:
        patcher = _load_as_the_host_does(path, description, dtype, disable_dynamic)
    guard_feed_forward(patcher.model.diffusion_model)
    mark_sigma_max(patcher.model)
    patcher.set_attachments(SOURCE, description)
    patcher.cached_patcher_init = (load_turbo_model, (path, dtype))
    return patcher


def is_ours(description):
    """True for what the host's own loader does not read, or reads without proj_l or scales."""
    return description.has_sla or not description.comfyui


def _misfit(path, error) -> TurboError:
    """Of sizes that Wan's models do not have, and the host's network therefore not: it says which at some length."""
    return TurboError(
        f"{path} does not fit ComfyUI's Wan ({shown(' '.join(str(error).split()), 200)}). Expected the sizes of a Wan "
        "model: use another file, or update ComfyUI."
    )


def _load_as_the_host_does(path, description, dtype, disable_dynamic):
    """A stock file by the host's own loader, whatever it is quantized as."""
    options, kinds = {} if dtype is None else {"dtype": dtype}, ", ".join(sorted(set(description.foreign.values())))
    try:
        patcher = comfy.sd.load_diffusion_model(path, model_options=options, disable_dynamic=disable_dynamic)
    except (KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        if not kinds:
            if comfy.model_management.is_oom(error):
                raise
            raise _misfit(path, error) from error
        raise TurboError(
            f"{path} is quantized as {kinds}, which this ComfyUI does not load ({type(error).__name__}: {error}). "
            "Update ComfyUI, or use the bf16 version of this model."
        ) from error
    for weight in patcher.model.diffusion_model.parameters():
        with_rows(weight)
    if kinds:
        logging.info(
            "TurboWan: %s is quantized as %s and was loaded by ComfyUI's own loader. The samplers, sparse attention, "
            "LoRAs, QuantizeW8A8 and TurboSave work on this MODEL; TurboConvert and TurboMerge do not read the file.",
            path,
            kinds,
        )
    return patcher


def text_encoder_sizes(tensors, path, contents=True):
    """check_encoder of a umT5 file as the host has them. Raises TurboError for any other."""
    missing = [name for name in _OF_UMT5 if name not in tensors]
    if missing:  # the host would take it for another kind, and start that with random weights
        kind = looks_like(tensors) or "something else"
        kind = "umT5 in another layout" if "umT5" in kind else kind
        raise TurboError(
            f"{path} is not a umT5 encoder as ComfyUI has them ({missing[0]} is missing), it is {kind}. Use ComfyUI's "
            "repack, umt5_xxl_fp16.safetensors or umt5_xxl_fp8_e4m3fn_scaled.safetensors."
        )
    return check_encoder(tensors, path, contents)


def load_text_encoder(path, disable_dynamic=False):
    """A CLIP from a umT5 file of any size, all of whose weights are there in shapes that fit together."""
    sd, metadata = read_tensors(path)
    sizes = text_encoder_sizes(sd, path)
    # as the host's own loader of files does: without it scales of fp8 weights would be dropped in silence
    sd, _ = comfy.utils.convert_old_quants(sd, metadata=metadata)
    clip = comfy.sd.load_text_encoder_state_dicts(
        [sd],
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=comfy.sd.CLIPType.WAN,
        model_options={TEXT_CONFIG: {theirs: sizes[ours] for ours, theirs in _TEXT_SIZES.items()}},
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = (_text_encoder_patcher, (path,))
    return clip


def _text_encoder_patcher(path, disable_dynamic=False):
    return load_text_encoder(path, disable_dynamic).patcher
