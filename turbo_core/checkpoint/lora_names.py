"""Names in LoRA files for Wan: which layer a tensor belongs to in any tool's spelling, and why one belongs to none."""

import json
import re

from .others import diffusers

_PREFIX = re.compile(
    r"(?:(?:base_model\.model|model\.diffusion_model|diffusion_model|transformer(?:_2)?|unet|pipe\.dit|dit|module|net)\."
    r"|lora_unet__?|lora_transformer_|lycoris_)+"
)
# What a tensor is to its layer; the longest name that leaves a layer in front. Repeats have a limit: without, a name of
# 100 kB takes seconds.
_PART = re.compile(
    r"[._](?:lora_(?:A|B)(?:\.[^.]+)?(?:\.weight)?|lora_(?:up|down|mid)\.weight|lora(?:_linear_layer)?\.(?:up|down)\.weight"
    r"|(?:hada|lokr)_\w{1,64}|alpha|dora_scale|lora_magnitude_vector(?:\.[^.]{1,64}){0,4}|diff|diff_b|set_weight|reshape_weight"
    r"|w_norm|b_norm|oft_\w{1,64}|rescale|[ab][12]\.weight)$"
)
_NAMED_ADAPTER = re.compile(r"(lora_[AB])\.(?!weight$)[^.]+\.weight$")
_TEXT = re.compile(r"(?:lora_(?:prior_)?te\d?_|text_encoders?[._\d]|te\d?\.|clip_[lgh]\.|t5xxl\.)")
_FAMILIES = (  # the first whose layer names these are
    ("Flux, Chroma or HunyuanVideo", r"(double|single)_blocks[._]\d|single_transformer_blocks[._]\d"),
    ("Qwen-Image", r"transformer_blocks[._]\d+[._](attn[._]add_|img_m|txt_m)"),
    ("LTX-Video or another model with transformer_blocks", r"transformer_blocks[._]\d"),
    ("Stable Diffusion 3", r"joint_blocks[._]\d"),
    ("Stable Diffusion or SDXL", r"(input|output|down|up)_blocks[._]\d|mid(dle)?_block"),
    ("Z-Image or Lumina", r"(^|[._])layers[._]\d+[._](attention|feed_forward)"),
)


def split_name(name: str) -> tuple[str, str]:
    """(layer without the prefixes of any tool, part) of a tensor's name; part is "" where it is of an unknown kind."""
    match = _PART.search(name)
    layer, part = (name[: match.start()], name[match.start() + 1 :]) if match else (name, "")
    return layer[_PREFIX.match(layer).end() :] if _PREFIX.match(layer) else layer, part


def spellings(layer: str) -> list[str]:
    """How tools write the name of an official layer: as it is, as Diffusers has it, and both with underscores."""
    names = [layer, diffusers.layer_name(layer) or layer]
    return list(dict.fromkeys(names + [name.replace(".", "_") for name in names]))


def in_comfyui_names(names, layers) -> dict[str, str]:
    """{name: the name that ComfyUI reads} of those tensors that belong to one of the layers of a Wan model.

    layers: official names, "blocks.0.self_attn.q". Tensors whose layer or part is unknown are left out.
    """
    lookup = {written: layer for layer in layers for written in spellings(layer)}
    result = {}
    for name in names:
        layer, part = split_name(name)
        if part and layer in lookup and not _TEXT.match(name):
            part = _NAMED_ADAPTER.sub(r"\1.weight", part)
            result[name] = f"diffusion_model.{lookup[layer]}.{part}"
    return result


def why_not(names, layers) -> dict[str, list[str]]:
    """{why: names} for tensors of a LoRA file that act on none of the layers of a Wan model, in a few words each."""
    known = {re.sub(r"\d+", "0", written) for layer in layers for written in spellings(layer)}
    blocks = 1 + max((int(m[1]) for m in (re.match(r"blocks\.(\d+)", layer) for layer in layers) if m), default=-1)
    reasons = {}
    for name in names:
        reasons.setdefault(_reason(name, known, blocks), []).append(name)
    return reasons


def stated_alphas(metadata: dict) -> list[tuple[float, float]]:
    """(alpha, rank) that a file's metadata state beside its tensors, as Diffusers keeps them, where they differ."""
    try:
        stated = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        return []
    stated = stated if isinstance(stated, dict) else {}
    stated = {name: value for name, value in stated.items() if type(value) in (int, float)}
    pairs = {(stated[n], stated.get(n[: -len("lora_alpha")] + "r")) for n in stated if n.endswith("lora_alpha")}
    return sorted(pair for pair in pairs if pair[1] and pair[0] != pair[1])


def _reason(name, known, blocks):
    layer, part = split_name(name)
    if _TEXT.match(name):
        return "for a text encoder; Wan's umT5 takes none"
    for family, pattern in _FAMILIES:
        if re.search(pattern, layer):
            return f"for {family}, not for Wan"
    block = re.search(r"(?:^|[._])blocks[._](\d{1,9})", layer)
    if block and int(block[1]) >= blocks and re.sub(r"\d+", "0", layer) in known:
        return f"for a Wan with more blocks; this one has {blocks}"
    if re.search(r"[kv]_img|add_[kv]_proj|norm_added_k|img_emb|image_embedder", layer):
        return "for the image branch of an I2V model, which this one does not have"
    if not part:
        return "of a kind that is unknown here"
    if part.startswith("lora_magnitude_vector"):
        return "a DoRA magnitude as PEFT stores it, which ComfyUI does not read"
    return "for a layer that this model does not have"
