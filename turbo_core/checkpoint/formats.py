"""Number formats of Wan checkpoints: how a weight is stored, what the file states of it, and to floats and fp8."""

import json
import math
import re

import torch

from ..errors import TurboError, shown
from ..int8 import block_scale_shape, dequantize

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INTEGERS = {"int8_block": "int8_block128", "int8_row": "int8_tensorwise"}  # to the name in X.comfy_quant
QUANTIZED = {**INTEGERS, "fp8": "float8_e4m3fn"}
FORMATS = (*INTEGERS, *FLOATS, "fp8")
FP8 = {torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2"}
STATED = {name: kind for kind, name in INTEGERS.items()} | dict.fromkeys(FP8.values(), "fp8")
_FLOAT_NAMES = {dtype: name for name, dtype in FLOATS.items()} | dict.fromkeys(FP8, "fp8")
_FP8_MAX = 448.0  # the largest float8_e4m3fn
_SLAB = 512  # rows in float32 at a time
_MOST_PREFIXES = 6  # parts that may stand before a name
_MOST_TEXT = 4096  # bytes of X.comfy_quant
_OF_INPUTS = "input_scale", "scale_input", "pre_quant_scale"  # no scales of a weight
_LIKE_A_SCALE = re.compile(r"scale|scb|absmax|qstat", re.IGNORECASE)  # in the names that other tools give one


def layer_format(name: str, tensors: dict, path) -> str:
    """How the weight `name` is stored: int8_block, int8_row, fp8, bf16, fp16 or fp32.

    Raises TurboError on a scale of the wrong shape (expected and got), a missing one, or an unknown dtype.
    """
    weight, scale = tensors[name], tensors.get(f"{name}_scale")
    if weight.dtype != torch.int8 and weight.dtype not in _FLOAT_NAMES:
        raise TurboError(
            f"{path}: {shown(name)} is stored as {weight.dtype}, which is not read here. "
            f"Expected int8, bf16, fp16, fp32 or fp8: use the bf16 version of this model."
        )
    if scale is None:
        if weight.dtype == torch.int8:
            raise TurboError(
                f"{path}: {shown(name)} is int8 but {shown(name)}_scale is missing. The file is incomplete."
            )
        return _FLOAT_NAMES[weight.dtype]
    shape = tuple(scale.shape)
    if weight.ndim != 2:
        raise TurboError(
            f"{path}: {shown(name)} is {weight.dtype} {list(weight.shape)} with a scale. Expected a matrix: use the "
            "bf16 version of this model."
        )
    if not scale.dtype.is_floating_point or scale.dtype in FP8:
        raise TurboError(f"{path}: {shown(name)}_scale is {scale.dtype}. Expected float32.")
    if shape == (weight.shape[0], 1) and weight.dtype in FP8:
        return "fp8"
    if weight.dtype == torch.int8:
        if shape == block_scale_shape(*weight.shape) and shape != (weight.shape[0], 1):
            return "int8_block"
        if shape == (weight.shape[0], 1):
            return "int8_row"
    blocks = f"{list(block_scale_shape(*weight.shape))} (128x128 blocks) or " if weight.dtype == torch.int8 else ""
    raise TurboError(
        f"{path}: {shown(name)} is {weight.dtype} {list(weight.shape)} and {shown(name)}_scale has the shape "
        f"{list(shape)}. "
        f"Expected {blocks}[{weight.shape[0]}, 1] (rows). The file is damaged or in a format that is not read here."
    )


def check_scale_names(tensors: dict, path) -> None:
    """Raise TurboError for an int8 or fp8 weight without a scale beside which something lies that may be one."""
    like_scales = {}  # {layer: a name}
    for name in tensors:
        layer, _, last = name.rpartition(".")
        if _LIKE_A_SCALE.search(last) and last not in _OF_INPUTS:
            like_scales.setdefault(layer, name)
            like_scales.setdefault(layer.rpartition(".")[0], name)  # or one level below it
    for name, tensor in tensors.items():
        quantized = tensor.dtype == torch.int8 or tensor.dtype in FP8
        if not quantized or not name.endswith(".weight") or f"{name}_scale" in tensors:
            continue
        layer = name.removesuffix("weight")
        beside = like_scales.get(layer[:-1])
        if beside is not None:
            kind = "int8" if tensor.dtype == torch.int8 else "fp8"
            raise TurboError(
                f"{path}: {shown(name)} is {kind} and its scale is looked for as {shown(name)}_scale, "
                f"weight_scale_inv, scale_weight or, of {shown(layer)}int8_weight, as {shown(layer)}scale. None is "
                f"there; {shown(beside)} "
                f"{list(tensors[beside].shape)} may be it. If the weight is {kind} times that, save it as "
                f"{shown(name)}_scale; else use the bf16 version of this model."
            )


def declared_formats(tensors: dict, metadata: dict, path) -> tuple[dict[str, str], dict[str, str]]:
    """({weight name: format}, {weight name: what a format that is not read here calls itself}) as the file states
    them of its layers, in X.comfy_quant or `_quantization_metadata`; formats as layer_format names them.

    Raises TurboError where it states nothing that is a format.
    """
    layers = _json(metadata.get("_quantization_metadata", "{}"), "_quantization_metadata", path).get("layers")
    stated = {_known(f"{layer}.weight", tensors): _dict(config) for layer, config in _dict(layers).items()}
    for name, tensor in tensors.items():
        if name.endswith(".comfy_quant"):
            if tensor.numel() > _MOST_TEXT:
                raise TurboError(f"{path}: {shown(name)} has {tensor.numel():,} bytes. Expected a few words of JSON.")
            text = bytes(tensor.flatten().to(torch.uint8).tolist()).decode("utf-8", "replace")
            stated[name.removesuffix("comfy_quant") + "weight"] = _json(text, name, path)
    known, foreign = {}, {}
    for name, config in stated.items():
        kind, rotated = config.get("format"), config.get("convrot") or _dict(config.get("params")).get("convrot")
        if not isinstance(kind, str):
            raise TurboError(
                f"{path}: {shown(name)} is quantized as {shown(kind)!r}, which is not read here. Expected "
                f"{', '.join(STATED)}: use the bf16 version of this model."
            )
        if kind in STATED and not rotated:
            known[name] = STATED[kind]
        else:
            foreign[name] = f"{shown(kind)}{' with convrot' if rotated else ''}"
    return known, foreign


def _known(name: str, tensors: dict) -> str:
    """The name without what stands before it in a file with a prefix, which metadata keep."""
    rest = name
    for _ in range(_MOST_PREFIXES):
        if rest in tensors:
            return rest
        rest = rest.partition(".")[2]
    return name


def transformer_config(metadata: dict, path) -> dict:
    """The `transformer` part of ComfyUI's `config` metadata, {} when there is none."""
    return _dict(_json(metadata.get("config", "{}"), "the metadata `config`", path).get("transformer"))


def _json(text: str, where: str, path) -> dict:
    try:
        return _dict(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise TurboError(f"{path}: {shown(where)} is not JSON ({text[:60]!r}). The file is damaged.") from error


def _dict(value) -> dict:
    return value if isinstance(value, dict) else {}


def decode(weight, scale=None, dtype=None):
    """A weight as a float tensor: int8 and fp8 are multiplied by their scale, floats only cast. dtype: default bf16
    for what was quantized, else as stored."""
    if weight.dtype == torch.int8:
        return dequantize(weight, scale.float(), dtype or torch.bfloat16)
    if weight.dtype in FP8:
        weight = weight.float() if scale is None else weight.float().mul_(scale.float())
        return weight.to(dtype or torch.bfloat16)
    return weight.to(dtype or weight.dtype)


def encode_fp8(weight):
    """Float matrix [N, K] -> (float8_e4m3fn [N, K], float32 scale []) with one scale for the whole tensor.

    The scale is the smallest power of two that brings the largest magnitude to 448 or less: multiplying by it is exact
    in every float type, also in bf16, to which the reader rounds the scale.
    """
    fraction, exponent = math.frexp(max(abs(edge.item()) for edge in weight.aminmax()) / _FP8_MAX)
    scale = 2.0 ** max(exponent - (fraction == 0.5), -126) if fraction else 1.0  # in float32 smaller ones vanish
    slabs = [(slab.float() / scale).to(torch.float8_e4m3fn) for slab in weight.split(_SLAB)]
    return torch.cat(slabs), torch.tensor(scale)


def is_finite(tensor) -> bool:
    """True for a float tensor without NaN and infinity."""
    return tensor.numel() == 0 or all(torch.isfinite(edge) for edge in tensor.aminmax())  # NaN shows in both


def check_scale_values(name: str, scale, path) -> None:
    """Raise TurboError where a scale, in float32 as it is used, is not finite or below zero."""
    scale = scale.float()
    check_finite(name, scale, path)
    if scale.numel() and scale.min() < 0:
        raise TurboError(f"{path}: {shown(name)} is negative. Expected scales above zero: the file is damaged.")


def check_finite(name: str, tensor, path) -> None:
    """Raise TurboError when a float tensor holds NaN or infinity."""
    if not is_finite(tensor):
        raise TurboError(f"{path}: {shown(name)} holds NaN or infinity. Expected finite weights: the file is damaged.")
