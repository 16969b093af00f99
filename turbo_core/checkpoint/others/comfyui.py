"""What files hold for ComfyUI: the attention that modules prefer, carried along here; and which it reads by itself."""

import json

import torch

from ...errors import shown
from ..formats import FLOATS

_SUFFIX = ".comfy_attention.config"  # JSON as bytes, {"attention": name, ...} or a list of such
_PREFIXES = ("", "model.diffusion_model.", "net.", "model.")  # that its detection of models takes off
_KNOWN = ("comfy_kitchen_int8", "comfy_kitchen_sol")
_MOST_TEXT = 4096  # bytes


def comfyui_reads(stored: dict, tensors: dict, formats: dict[str, str], declared) -> bool:
    """True where ComfyUI's own loader takes a stock model for what it is read as here.

    stored, tensors: as in the file, and under official names; formats: of the weights that may be quantized; declared:
    names of those of which the file says so. A scale that nobody points out to it, ComfyUI leaves out without a word.
    """
    prefix = max((p for p in _PREFIXES if f"{p}head.modulation" in stored), key=len, default="")
    bare = {name.removeprefix(prefix): tensor.shape for name, tensor in stored.items() if name.startswith(prefix)}
    scaled = "scaled_fp8" in bare
    for name, tensor in tensors.items():
        if not name.endswith("_scale") and bare.get(name) != tensor.shape:
            return False
    for name, kind in formats.items():
        told = name in declared or (scaled and f"{name.removesuffix('weight')}scale_weight" in bare)
        if kind == "int8_block" or (kind not in FLOATS and f"{name}_scale" in tensors and not told):
            return False
    return True


def is_attention(name: str) -> bool:
    """True for the name of a tensor that holds such a preference."""
    return name.endswith(_SUFFIX)


def attention_settings(tensors: dict) -> tuple[dict[str, str], list[str]]:
    """({module: text}, notes): the text is what the tensor's bytes say, for attention_tensors. What is no short text
    is left out, which a note tells."""
    texts, kinds = {}, []
    for name, tensor in tensors.items():
        if not is_attention(name):
            continue
        if tensor.dtype != torch.uint8 or tensor.numel() > _MOST_TEXT or tensor.is_meta:
            kinds.append(f"unknown: {tensor.dtype} {list(tensor.shape)}")
            continue
        text = bytes(tensor.flatten().tolist()).decode("utf-8", "surrogateescape")
        texts[name.removesuffix(_SUFFIX)] = text
        kinds.append(_kinds(text))
    asked = "; ".join(dict.fromkeys(kinds))
    return texts, [f"{len(kinds)} modules name the attention they want in ComfyUI: {asked}"] if kinds else []


def attention_tensors(texts: dict[str, str]) -> dict[str, torch.Tensor]:
    """{name: tensor} of {module: text}, bit for bit what attention_settings read."""
    return {
        f"{module}{_SUFFIX}": torch.tensor(list(text.encode("utf-8", "surrogateescape")), dtype=torch.uint8)
        for module, text in texts.items()
    }


def _kinds(text: str) -> str:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    wishes = content if isinstance(content, list) else [content]
    kinds = [wish.get("attention") if isinstance(wish, dict) else None for wish in wishes]
    if not kinds or not all(isinstance(kind, str) and kind in _KNOWN for kind in kinds):
        return f"unknown: {shown(text)}"
    return ", then ".join(kinds)
