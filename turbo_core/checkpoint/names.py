"""Names in Wan checkpoints: any spelling in, official names out; and what names tell, those of foreign files too."""

import re

from ..errors import TurboError, shown
from ..int8 import block_scale_shape
from ..wan import QUANTIZED_LINEARS
from .formats import FP8
from .others import diffusers

PROJ_L = "self_attn.attn_op.local_attn.proj_l"
DIFFUSERS = "names translated from Diffusers' layout"  # in the notes of a file that has it
_WRAPPERS = re.compile(r"\b(?:_checkpoint_wrapped_module|_fsdp_wrapped_module|_orig_mod)\.")
_RENAMED = {"int8_weight": "weight", "scale": "weight_scale"} | dict.fromkeys(
    ("scale_weight", "weight_scale_inv"),
    "weight_scale",  # both are multiplied by, whatever they are called
)
_HELPERS = (".comfy_quant", ".input_scale", ".scale_input")  # describe a quantized layer, hold no weights
_LINEAR = re.compile(r"(?:vace_)?blocks\.\d+\.(?:" + "|".join(map(re.escape, QUANTIZED_LINEARS)) + r")\.weight")
_DELICATE = re.compile(r"\.proj_l\.|(?:^|\.)modulation$|\.norm[^.]*\.")
# (what it is, fragments that must all occur in some key); the first match wins
_SIGNATURES = (
    ("a LoRA. Load it with a LoRA node on top of a model, or give it as --lora", (".lora_A.",)),
    ("a LoRA. Load it with a LoRA node on top of a model, or give it as --lora", (".lora_down.",)),
    ("a LoRA. Load it with a LoRA node on top of a model, or give it as --lora", (".lora_up.",)),
    (
        "part of a Wan model in the diffusers layout. Open its folder, or the .safetensors.index.json in it",
        ("condition_embedder.time_embedder.", "blocks.0.attn1.to_q."),
    ),
    ("HunyuanVideo", ("double_blocks.0.img_attn_qkv.",)),
    ("HunyuanVideo", ("double_blocks.0.", "txt_in.individual_token_refiner.")),
    ("Flux", ("double_blocks.0.img_attn.", "single_blocks.0.")),
    ("Flux or another model in the diffusers layout", ("single_transformer_blocks.0.",)),
    ("LTX-Video", ("patchify_proj.", "adaln_single.")),
    ("LTX-Video", ("patchify_proj.", "transformer_blocks.0.attn1.")),
    ("Qwen-Image", ("transformer_blocks.0.attn.add_q_proj.", "txt_norm.")),
    ("Stable Diffusion 3", ("joint_blocks.0.",)),
    ("SDXL", ("input_blocks.0.0.", "label_emb.0.0.")),
    ("Stable Diffusion 1 or 2", ("input_blocks.0.0.", "middle_block.")),
    ("the umT5 text encoder. It belongs in text_encoders", ("encoder.block.0.layer.0.SelfAttention.", "shared.")),
    (
        "the umT5 text encoder. It belongs in text_encoders",
        ("token_embedding.", "blocks.0.attn.q.", "blocks.0.ffn.gate"),
    ),
    ("a CLIP model", ("text_model.encoder.layers.0.",)),
    ("a CLIP vision model", ("vision_model.encoder.layers.0.",)),
    ("a CLIP model", ("visual.transformer.", "log_scale")),
    ("the Wan VAE. It belongs in vae", ("decoder.middle.0.residual.0.", "encoder.conv1.")),
    ("a VAE", ("decoder.conv_in.", "decoder.mid")),
    ("a language model", ("layers.0.self_attn.q_proj.", "embed_tokens.")),
    ("a language model", ("layers.0.self_attn.qkv_proj.",)),
)


def canonical(tensors: dict, path) -> tuple[dict, list[str]]:
    """({official name: tensor}, notes) of a Wan file in any known spelling; nothing is read from the tensors.

    Handles prefixes (net., model.diffusion_model., module. ...: whatever stands before head.modulation), wrappers
    inside names, Diffusers' names, the published names of quantized layers, the 2-D patch embedding, and scales
    stored flat. Keys outside the prefix are left out and noted. Without head.modulation the names stay as they are.
    Raises TurboError when two keys come to the same name.
    """
    bare = {}
    for name, tensor in tensors.items():
        _add(bare, _WRAPPERS.sub("", name), tensor, path)
    prefixes = _prefixes(bare, "head.modulation")
    translated = not prefixes and bool(prefixes := _prefixes(bare, diffusers.MARK))
    # averaged weights first, as among nested dictionaries
    prefix = min(prefixes, key=lambda p: ("ema" not in p, len(p)), default="")
    notes = [f"prefix {shown(prefix)!r} removed from the names"] if prefix else []
    inside = {n[len(prefix) :]: t for n, t in bare.items() if n.startswith(prefix)}
    if len(inside) < len(bare):
        notes.append(f"{len(bare) - len(inside)} tensors outside {shown(prefix)!r} left out")
    if translated:
        theirs, inside = inside, {}
        if any(name.startswith(("face_adapter.", "motion_encoder.", "face_encoder.")) for name in theirs):
            raise TurboError(
                f"{path} is Wan Animate in Diffusers' layout, whose own parts are not translated here. Use the "
                "original repository's file, or ComfyUI's."
            )
        for name, tensor in theirs.items():
            _add(inside, diffusers.official_name(name), tensor, path)
        notes.append(DIFFUSERS)
    result = {}
    for name, tensor in inside.items():
        stem, _, last = name.rpartition(".")
        if last == "scaled_fp8":
            continue
        if (last != "scale" and last in _RENAMED) or (last == "scale" and f"{stem}.int8_weight" in inside):
            name = f"{stem}.{_RENAMED[last]}"
        _add(result, name, tensor, path)
    return {n: _canonical_shape(n, t, result) for n, t in result.items()}, notes


def is_quantizable(name: str) -> bool:
    """True for the weights of the ten linears per block that W8A8 replaces."""
    return _LINEAR.fullmatch(name) is not None


def is_delicate(name: str) -> bool:
    """True for what is small and kept in float32 where the source has it so: proj_l, norms and modulation."""
    return _DELICATE.search(name) is not None


def is_helper(name: str) -> bool:
    """True for keys that belong to a quantized layer and hold no weights."""
    return name.endswith(_HELPERS)


def is_scale(name: str, tensors: dict) -> bool:
    """True for the weight_scale of a layer whose weight is there."""
    return name.endswith(".weight_scale") and name.removesuffix("_scale") in tensors


def looks_like(names) -> str | None:
    """A few words on what the keys of a foreign checkpoint belong to, None when unknown."""
    names = list(names)
    for kind, fragments in _SIGNATURES:
        if all(any(fragment in name for name in names) for fragment in fragments):
            return kind
    return None


def _prefixes(names, mark: str) -> list[str]:
    """What stands before the mark wherever it occurs."""
    return [n[: -len(mark)] for n in names if n == mark or n.endswith("." + mark)]


def _add(into: dict, name: str, tensor, path):
    if name in into:
        raise TurboError(
            f"{path}: two keys stand for {shown(name)}. Expected one: save the file again without the other."
        )
    into[name] = tensor


def _canonical_shape(name, tensor, tensors):
    if name == "patch_embedding.weight" and tensor.ndim == 2 and tensor.shape[1] % 4 == 0 and tensor.numel():
        return tensor.reshape(tensor.shape[0], -1, 1, 2, 2)  # columns run over channel, time, height, width
    if name.endswith(".weight_scale"):
        weight = tensors.get(name.removesuffix("_scale"))
        if weight is None or weight.ndim != 2:
            return tensor
        rows, blocks = weight.shape[0], block_scale_shape(*weight.shape)
        if tensor.numel() == 1 and (tensor.ndim < 2 or weight.dtype in FP8 or blocks != (1, 1)):
            return tensor.reshape(1, 1).expand(rows, 1)  # one scale for the whole tensor
        if tensor.ndim == 1 and tensor.numel() == rows:
            return tensor.reshape(rows, 1)
    return tensor
