"""Key names and number formats of Wan checkpoints: any spelling in, official names out."""

import json
import math
import re

import torch

from .errors import TurboError
from .int8 import block_scale_shape, dequantize
from .wan import QUANTIZED_LINEARS

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INTEGERS = {"int8_block": "int8_block128", "int8_row": "int8_tensorwise"}  # to the name in X.comfy_quant
QUANTIZED = {**INTEGERS, "fp8": "float8_e4m3fn"}
FORMATS = (*INTEGERS, *FLOATS, "fp8")
PROJ_L = "self_attn.attn_op.local_attn.proj_l"
_FP8 = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
_STATED = {name: kind for kind, name in INTEGERS.items()} | dict.fromkeys(_FP8.values(), "fp8")
_FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()} | dict.fromkeys(_FP8, "fp8")
_FP8_MAX = 448.0  # the largest float8_e4m3fn
_SLAB = 512  # rows in float32 at a time
_WRAPPERS = re.compile(r"\b(?:_checkpoint_wrapped_module|_fsdp_wrapped_module|_orig_mod)\.")
_RENAMED = {"int8_weight": "weight", "scale": "weight_scale", "scale_weight": "weight_scale"}
_HELPERS = (".comfy_quant", ".input_scale", ".scale_input")  # describe a quantized layer, hold no weights
_LINEAR = re.compile(r"(?:vace_)?blocks\.\d+\.(?:" + "|".join(map(re.escape, QUANTIZED_LINEARS)) + r")\.weight")
_DELICATE = re.compile(r"\.proj_l\.|(?:^|\.)modulation$|\.norm[^.]*\.")


def is_quantizable(name: str) -> bool:
    """True for the weights of the ten linears per block that W8A8 replaces."""
    return _LINEAR.fullmatch(name) is not None


def is_delicate(name: str) -> bool:
    """True for what is small and kept in float32 where the source has it so: proj_l, norms and modulation."""
    return _DELICATE.search(name) is not None


def canonical(tensors: dict, path) -> tuple[dict, list[str]]:
    """({official name: tensor}, notes) of a Wan file in any known spelling; nothing is read from the tensors.

    Handles prefixes (net., model.diffusion_model., module. ...: whatever stands before head.modulation), wrappers
    inside names, the published names of quantized layers, the 2-D patch embedding, and scales stored flat. Keys
    outside the prefix are left out and noted. Without head.modulation the names stay as they are.
    Raises TurboError when two keys come to the same name.
    """
    bare = {}
    for name, tensor in tensors.items():
        _add(bare, _WRAPPERS.sub("", name), tensor, path)
    end = "head.modulation"
    prefixes = [n[: -len(end)] for n in bare if n == end or n.endswith("." + end)]
    # averaged weights first, as among nested dictionaries
    prefix = min(prefixes, key=lambda p: ("ema" not in p, len(p)), default="")
    notes = [f"prefix {prefix!r} removed from the names"] if prefix else []
    inside = {n[len(prefix) :]: t for n, t in bare.items() if n.startswith(prefix)}
    if len(inside) < len(bare):
        notes.append(f"{len(bare) - len(inside)} tensors outside {prefix!r} left out")
    result = {}
    for name, tensor in inside.items():
        stem, _, last = name.rpartition(".")
        if last == "scaled_fp8":
            continue
        if last == "int8_weight" or last == "scale_weight" or (last == "scale" and f"{stem}.int8_weight" in inside):
            name = f"{stem}.{_RENAMED[last]}"
        _add(result, name, tensor, path)
    return {n: _canonical_shape(n, t, result) for n, t in result.items()}, notes


def _add(into: dict, name: str, tensor, path):
    if name in into:
        raise TurboError(f"{path}: two keys stand for {name}. Expected one: save the file again without the other.")
    into[name] = tensor


def _canonical_shape(name, tensor, tensors):
    if name == "patch_embedding.weight" and tensor.ndim == 2 and tensor.shape[1] % 4 == 0:
        return tensor.reshape(tensor.shape[0], -1, 1, 2, 2)  # columns run over channel, time, height, width
    if name.endswith(".weight_scale"):
        weight = tensors.get(name.removesuffix("_scale"))
        if weight is None or weight.ndim != 2:
            return tensor
        rows, blocks = weight.shape[0], block_scale_shape(*weight.shape)
        if tensor.numel() == 1 and (tensor.ndim < 2 or weight.dtype in _FP8 or blocks != (1, 1)):
            return tensor.reshape(1, 1).expand(rows, 1)  # one scale for the whole tensor
        if tensor.ndim == 1 and tensor.numel() == rows:
            return tensor.reshape(rows, 1)
    return tensor


def is_helper(name: str) -> bool:
    """True for keys that belong to a quantized layer and hold no weights."""
    return name.endswith(_HELPERS)


def layer_format(name: str, tensors: dict, path) -> str:
    """How the weight `name` is stored: int8_block, int8_row, fp8, bf16, fp16 or fp32.

    Raises TurboError on a scale of the wrong shape (expected and got), a missing one, or an unknown dtype.
    """
    weight, scale = tensors[name], tensors.get(f"{name}_scale")
    if weight.dtype != torch.int8 and weight.dtype not in _FLOAT_NAMES:
        raise TurboError(
            f"{path}: {name} is stored as {weight.dtype}, which is not read here. "
            f"Expected int8, bf16, fp16, fp32 or fp8: use the bf16 version of this model."
        )
    if scale is None:
        if weight.dtype == torch.int8:
            raise TurboError(f"{path}: {name} is int8 but {name}_scale is missing. The file is incomplete.")
        return _FLOAT_NAMES[weight.dtype]
    shape = tuple(scale.shape)
    if not scale.dtype.is_floating_point or scale.dtype in _FP8:
        raise TurboError(f"{path}: {name}_scale is {scale.dtype}. Expected float32.")
    if weight.ndim == 2 and shape == (weight.shape[0], 1) and weight.dtype in _FP8:
        return "fp8"
    if weight.ndim == 2 and weight.dtype == torch.int8:
        if shape == block_scale_shape(*weight.shape) and shape != (weight.shape[0], 1):
            return "int8_block"
        if shape == (weight.shape[0], 1):
            return "int8_row"
    blocks = f"{list(block_scale_shape(*weight.shape))} (128x128 blocks) or " if weight.dtype == torch.int8 else ""
    raise TurboError(
        f"{path}: {name} is {weight.dtype} {list(weight.shape)} and {name}_scale has the shape {list(shape)}. "
        f"Expected {blocks}[{weight.shape[0]}, 1] (rows). The file is damaged or in a format that is not read here."
    )


def declared_formats(tensors: dict, metadata: dict, path) -> dict[str, str]:
    """{weight name: format} that the file states of its layers, in X.comfy_quant or `_quantization_metadata`.

    Formats as layer_format names them. Raises TurboError for a quantization that is not read here.
    """
    layers = _json(metadata.get("_quantization_metadata", "{}"), "_quantization_metadata", path).get("layers")
    stated = {f"{layer}.weight": _dict(config) for layer, config in _dict(layers).items()}
    for name, tensor in tensors.items():
        if name.endswith(".comfy_quant"):
            text = bytes(tensor.flatten().to(torch.uint8).tolist()).decode("utf-8", "replace")
            stated[name.removesuffix("comfy_quant") + "weight"] = _json(text, name, path)
    for name, config in stated.items():
        rotated = config.get("convrot") or _dict(config.get("params")).get("convrot")
        if config.get("format") not in _STATED or rotated:
            raise TurboError(
                f"{path}: {name} is quantized as {config.get('format')!r}{' with convrot' if rotated else ''}, which "
                f"is not read here. Expected {', '.join(_STATED)}: use the bf16 version of this model."
            )
    return {name: _STATED[config["format"]] for name, config in stated.items()}


def transformer_config(metadata: dict, path) -> dict:
    """The `transformer` part of ComfyUI's `config` metadata, {} when there is none."""
    return _dict(_json(metadata.get("config", "{}"), "the metadata `config`", path).get("transformer"))


def _json(text: str, where: str, path) -> dict:
    try:
        return _dict(json.loads(text))
    except ValueError as error:
        raise TurboError(f"{path}: {where} is not JSON ({text[:60]!r}). The file is damaged.") from error


def _dict(value) -> dict:
    return value if isinstance(value, dict) else {}


def decode(weight, scale=None, dtype=None):
    """A weight as a float tensor: int8 and fp8 are multiplied by their scale, floats only cast. dtype: default bf16
    for what was quantized, else as stored."""
    if weight.dtype == torch.int8:
        return dequantize(weight, scale.float(), dtype or torch.bfloat16)
    if weight.dtype in _FP8:
        weight = weight.float() if scale is None else weight.float().mul_(scale.float())
        return weight.to(dtype or torch.bfloat16)
    return weight.to(dtype or weight.dtype)


def encode_fp8(weight):
    """Float matrix [N, K] -> (float8_e4m3fn [N, K], float32 scale []) with one scale for the whole tensor.

    The scale is the smallest power of two that brings the largest magnitude to 448 or less: multiplying by it is exact
    in every float type, also in bf16, to which the reader rounds the scale.
    """
    fraction, exponent = math.frexp(max(abs(edge.item()) for edge in weight.aminmax()) / _FP8_MAX)
    scale = 2.0 ** (exponent - (fraction == 0.5)) if fraction else 1.0
    slabs = [(slab.float() / scale).to(torch.float8_e4m3fn) for slab in weight.split(_SLAB)]
    return torch.cat(slabs), torch.tensor(scale)
