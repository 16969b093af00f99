"""What a file says of the attention that its modules prefer: for ComfyUI to follow, and carried along here."""

import json

import torch

from ...errors import shown

_SUFFIX = ".comfy_attention.config"  # JSON as bytes, {"attention": name, ...} or a list of such
_KNOWN = ("comfy_kitchen_int8", "comfy_kitchen_sol")
_MOST_TEXT = 4096  # bytes


def is_attention(name: str) -> bool:
    """True for the name of a tensor that holds such a preference."""
    return name.endswith(_SUFFIX)


def attention_settings(tensors: dict) -> tuple[dict[str, str], list[str]]:
    """({module: text}, notes): the text is what the tensor's bytes say, for attention_tensors. What is no short text
    is left out, which a note tells."""
    texts, kinds = {}, []
    for name, tensor in tensors.items():
        if not is_attention(name) or tensor.is_meta:
            continue
        if tensor.dtype != torch.uint8 or tensor.numel() > _MOST_TEXT:
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
