"""The linears of a MODEL as int8."""

import fnmatch
import logging
import re
import uuid

import comfy.model_management
import comfy.utils
import torch
from comfy.ldm.wan.model import WanAttentionBlock, WanModel
from comfy.ops import CastWeightBiasOp
from comfy.patcher_extension import WrappersMP
from comfy.quant_ops import QuantizedTensor
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

from ...turbo_core.errors import TurboError, quoted
from ...turbo_core.int8 import layout, quantize_block, quantize_rows
from .fused import FusedWanBlock, guard_feed_forward
from .kernels import prove_for
from .ops import ROW, quant_entry, quantized_ops, refuse_weight_hooks
from .schedule import mark_sigma_max
from .weights import PREFIX, float_weight, original_weight

LAYOUTS = {quantize_block: layout.NAME, quantize_rows: ROW}
_BLOCK = re.compile(r"(vace_)?blocks\.(\d+)\.(.+)")  # VACE's own blocks are Wan blocks as well


def wan_layers(network, kinds, skipped):
    """Names of the linears of these kinds in a Wan network; skipped: numbers of blocks to leave out."""
    blocks = ((name, _BLOCK.fullmatch(name)) for name, _ in network.named_modules())
    return [n for n, block in blocks if block and block[3] in kinds and (block[1] or int(block[2]) not in skipped)]


def matching_layers(network, pattern):
    """Names of the linears that a pattern such as "double_blocks.*, -*_mod.*" takes, in the order of the network.

    Wildcards as in file names, commas between the parts, a minus before a part that takes away again.
    Raises TurboError when nothing is left, showing what the layers of this network are called.
    """
    parts = [part.strip() for part in pattern.split(",") if part.strip()]
    taken = [part for part in parts if not part.startswith("-")]
    left_out = [part[1:].strip() for part in parts if part.startswith("-")]
    linears = [n for n, m in network.named_modules() if isinstance(m, CastWeightBiasOp) and hasattr(m, "in_features")]

    def within(name, globs):
        return any(fnmatch.fnmatchcase(name, glob) for glob in globs)

    layers = [name for name in linears if within(name, taken) and not within(name, left_out)]
    if not layers:
        kinds = dict.fromkeys(re.sub(r"\d+", "*", name) for name in linears)
        raise TurboError(
            f"pattern {quoted(pattern)} takes none of the {len(linears)} linear layers of {type(network).__name__}. "
            f"They are called {', '.join(list(kinds)[:12])}: write some of these, with commas between."
        )
    return layers


def quantized_state_dict(patcher, quantize, layers):
    """State dict of the network with the named layers ("blocks.0.ffn.0", ...) as int8, their LoRAs baked in."""
    sd = patcher.model.diffusion_model.state_dict()
    for key in patcher.backup:
        if key.startswith(PREFIX):
            weight, name = original_weight(patcher, key), key.removeprefix(PREFIX)
            sd.update(weight.state_dict(name) if isinstance(weight, QuantizedTensor) else {name: weight})
    progress = comfy.utils.ProgressBar(len(layers))
    for layer in layers:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.update(1)
        key = f"{PREFIX}{layer}.weight"
        stored_as = getattr(original_weight(patcher, key), "_layout_cls", None)
        if stored_as == LAYOUTS[quantize] and key not in patcher.patches:
            continue  # in this format already: rounding it again would only lose
        weight = float_weight(patcher, key)
        if f"{layer}.pre_quant_scale" in sd:  # of the layer's input, which int8 layers do not scale
            weight = weight.float() * sd[f"{layer}.pre_quant_scale"].to(weight.device)
        if not torch.isfinite(weight).all():
            raise TurboError(f"{layer}.weight holds NaN or infinity, quantizing it would spread them: check the model.")
        weight_q, scale = quantize(weight)
        for name in [n for n in sd if n.startswith(f"{layer}.") and n != f"{layer}.bias"]:
            del sd[name]
        # moved one by one: a large model would not fit beside itself
        sd[f"{layer}.weight"], sd[f"{layer}.weight_scale"] = (t.to(patcher.offload_device) for t in (weight_q, scale))
        sd[f"{layer}.comfy_quant"] = quant_entry(weight_q, scale)
    return {name: tensor.to(patcher.offload_device) for name, tensor in sd.items()}


def _check_unbound(patcher):
    """Raise TurboError for what other nodes have tied to the layers of the old network, and would be lost."""
    compiled = patcher.get_wrappers(WrappersMP.APPLY_MODEL, COMPILE_KEY)
    bound = ["the compiled network of TorchCompileModel"] if compiled else []
    bound += [f"the injection {name!r} (a bypass LoRA is one)" for name in patcher.injections]
    if getattr(patcher, "additional_models", {}).get("multigpu"):
        bound.append("the copies on other GPUs of MultiGPU CFG Split")
    bound += [f"the patch of {key}" for key in patcher.object_patches if f"{key}.".startswith(PREFIX)]
    if bound:
        raise TurboError(
            f"QuantizeW8A8 builds a new network and cannot take along what is tied to the old one: {', '.join(bound)}. "
            "Put that node after QuantizeW8A8."
        )


def quantize_patcher(patcher, quantize, layers):
    """A new MODEL with its own int8 network and every setting of the old one.

    LoRAs on the quantized weights are baked in, all others stay as they are. The old MODEL is left untouched. Layers
    that the host does not build from the operations it is given, as proj_l, stay as they are.
    """
    _check_unbound(patcher)
    patcher = patcher.clone()
    prove_for(patcher)
    old = patcher.model.model_config
    config = object.__new__(type(old))  # copy.copy stumbles over the config's catch-all __getattr__
    config.__dict__.update(old.__dict__)
    source = patcher.model.diffusion_model
    if type(source) is WanModel and all(type(block) is WanAttentionBlock for block in source.blocks):
        config.unet_config = old.unet_config | {"wan_attn_block_class": FusedWanBlock}
    operations = quantized_ops(patcher.model.manual_cast_dtype or patcher.model.get_dtype())
    config.custom_operations = operations
    model = config.get_model(source.state_dict(), "")
    network = model.diffusion_model
    fixed = [layer for layer in layers if not isinstance(network.get_submodule(layer), operations.Linear)]
    if fixed:
        logging.info("TurboWan: not quantized, because they are of a fixed type: %s", ", ".join(fixed))
        layers = [layer for layer in layers if layer not in fixed]
    sd = quantized_state_dict(patcher, quantize, layers)
    model.load_model_weights(sd, "", assign=patcher.is_dynamic())
    if isinstance(network, WanModel):
        guard_feed_forward(network)
        mark_sigma_max(model)
    new = patcher.clone(model_override=(model, ({}, {}, {}, set())))
    new.size, new.parent, new.is_injected, new.hook_backup = 0, None, False, {}
    if hasattr(new, "fast_disk"):  # newer hosts read such weights from their file again; these are in no file
        new.fast_disk = False
    new.cached_hook_patches.clear()
    refuse_weight_hooks(new)
    new.clone_base_uuid, new.patches_uuid = uuid.uuid4(), uuid.uuid4()
    baked = {key: new.patches.pop(key) for key in [f"{PREFIX}{layer}.weight" for layer in layers] if key in new.patches}
    if patcher.cached_patcher_init is not None:
        new.cached_patcher_init = (_quantize_again, (patcher.cached_patcher_init, baked, quantize, layers))
    return new


def _quantize_again(source, baked, quantize, layers, disable_dynamic=False):
    patcher = source[0](*source[1], disable_dynamic=disable_dynamic)
    patcher = patcher[source[2]] if len(source) > 2 else patcher  # a checkpoint loader returns several
    patcher.patches = dict(baked)
    return quantize_patcher(patcher, quantize, layers)
