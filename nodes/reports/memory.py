"""What a run with fused blocks takes on the card, told to the host before it decides what of the weights stays there.

The host's own estimate is for blocks of layers: for fused ones three times too much at 14B. It is replaced only where
every block is fused for certain; whatever may send a block the host's way keeps the host's.
"""

import comfy.model_management
from comfy.patcher_extension import WrappersMP

from ...turbo_core.int8 import BLOCK, layout
from ...turbo_core.sla import HEAD_DIMS
from ...turbo_core.wan import QUANTIZED_LINEARS
from ...turbo_core.wan import fused as wan_fused
from ..host.blocks import has_trained_sla
from ..host.fused import BETWEEN, FusedWanBlock, has_own_parts, quantized_as
from ..host.override import OVERRIDE
from ..host.settings import DEFAULTS, OPTIONS
from ..host.weights import PREFIX

_KEY = "turbowan_memory"
_ROPE, _ANGLES = 1024, 512  # bytes a token: the host's 2x2 matrices in float32, our sines and cosines
_AREA = 4  # latent pixels a token, by which the host counts
_UNIT = 0.01 * 2**20  # the host's bytes a latent pixel, byte of a number and unit of memory_usage_factor


def tell_memory(patcher):
    """Have the host ask for what the fused blocks of this MODEL take. Returns it."""
    patcher.remove_wrappers_with_key(WrappersMP.PREPARE_SAMPLING, _KEY)  # of a node before this one
    patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, _KEY, _prepare)
    return patcher


def _prepare(executor, patcher, *args, **kwargs):
    """The host's preparation of a run, with our factor in place of its own as long as that lasts."""
    model, size = patcher.model, comfy.model_management.dtype_size(patcher.model.get_dtype_inference())
    before = model.memory_usage_factor
    chosen = before != model.model_config.memory_usage_factor  # by a node for that, which knows better
    if chosen or not (_by_area(patcher.load_device) and _all_fused(patcher)):
        return executor(patcher, *args, **kwargs)
    model.memory_usage_factor = token_bytes(patcher, size) / (_AREA * size * _UNIT)
    try:
        return executor(patcher, *args, **kwargs)
    finally:
        model.memory_usage_factor = before


def _by_area(device):
    """True where the host counts attention as a kernel that keeps no scores, which is the form our factor is for."""
    management = comfy.model_management
    kept = management.xformers_enabled() or management.pytorch_attention_flash_attention()
    return kept and wan_fused.pays(device)


def _all_fused(patcher):
    """True where nothing is known that would send a block of the MODEL the host's way, a LoRA or a patch for one."""
    blocks = getattr(patcher.model.diffusion_model, "blocks", ())
    if not all(isinstance(block, FusedWanBlock) and has_own_parts(block) for block in blocks):
        return False
    options = patcher.model_options["transformer_options"]
    changed = patcher.injections or patcher.hook_patches or options.get("patches_replace", {}).get("dit")
    changed = changed or any(options.get("patches", {}).get(name) for name in BETWEEN)
    touched = (*patcher.patches, *patcher.object_patches, *patcher.weight_wrapper_patches)
    if changed or _others_attend(options, blocks) or any(name.startswith(f"{PREFIX}blocks.") for name in touched):
        return False
    layers = [block.get_submodule(name) for block in blocks for name in QUANTIZED_LINEARS]
    return {quantized_as(layer, patcher.load_device) for layer in layers} in ({"row"}, {"block"})


def _others_attend(options, blocks):
    """True where another node's override, or what a file prefers, may take memory for attention that we do not know."""
    override = options.get(OVERRIDE)
    ours = override is None or getattr(override, "turbowan_previous", override) is None
    wishes = (getattr(block.self_attn, "comfy_attention", None) for block in blocks)
    return not ours or any(getattr(wish, "function", None) is not None for wish in wishes)


def token_bytes(patcher, size):
    """Bytes a token that are alive together at the worst moment of a run; size: bytes of an activation."""
    network, options = patcher.model.diffusion_model, patcher.model_options["transformer_options"]
    block = network.blocks[0]
    trained, head_dim = has_trained_sla(network), block.self_attn.head_dim
    settings = options.get(OPTIONS, DEFAULTS if trained else None)
    sparse = settings is not None and settings["mode"] != "dense" and head_dim in HEAD_DIMS
    by_block = block.ffn[0].weight._layout_cls == layout.NAME
    quantized = sparse and trained and by_block and head_dim == BLOCK
    inside = block_bytes(
        block.dim, block.ffn_dim, size, settings["precision"] if sparse else None, not by_block, quantized
    )
    channels = patcher.model.model_config.unet_config["in_dim"]
    latents = 16 * (channels + network.out_dim) + (4 * size * channels if channels > network.out_dim else 0)
    return inside + _ROPE + (_ANGLES if sparse and trained else 0) + latents


def block_bytes(dim, ffn_dim, size, precision, rows, quantized):
    """The same inside a block: where attention ends, or in the feed-forward part. The tests count these bytes.

    precision: of sparse attention, or None for the host's. rows: int8 by rows. quantized: attention gives int8.
    """
    held = 5 * size  # the hidden state as the first block gets it, and in order; q, k, v
    inside = {"bf16": size, "int8": 3, None: 0}[precision]  # k, and v where the card has no fp8
    attention = dim * (held + inside + (1 if quantized else size))
    # the hidden state of before, in and out; its int8 form beside a slice of floats; int8 between the two products
    return max(attention, dim * (3 * size + rows) + ffn_dim)
