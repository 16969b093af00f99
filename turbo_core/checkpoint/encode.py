"""The middle of a conversion: what each tensor of a file becomes, and making it so, one tensor at a time."""

import json

import torch

from ..disk import Disk
from ..errors import TurboError, shown
from ..files import state_of
from ..int8 import block_scale_shape, quantize_block, quantize_rows
from .formats import FLOATS, FP8, INTEGERS, QUANTIZED, check_finite, check_scale_values, decode, encode_fp8, is_finite
from .names import is_delicate, is_helper, is_quantizable, is_scale
from .others.comfyui import is_attention
from .write import Layout

_SLAB = 512  # rows quantized at once, a multiple of 128: bounds the float32 copies, and is the fastest on a CPU
_QUANTIZERS = {"int8_block": quantize_block, "int8_row": quantize_rows}
_COMFY_QUANT = {
    kind: torch.frombuffer(bytearray(json.dumps({"format": name}).encode()), dtype=torch.uint8)
    for kind, name in QUANTIZED.items()
}
Plan = dict[str, str | torch.dtype]


def plan(tensors: dict, stored: dict[str, str], format: str) -> Plan:
    """{name: "int8_block", "int8_row", "fp8" or a dtype} of every tensor that a file of the given format gets."""
    result = {}
    for name, tensor in tensors.items():
        if is_helper(name) or is_scale(name, tensors):
            continue
        was, isfloat = stored.get(name), tensor.is_floating_point()
        dtype = tensor.dtype if isfloat and tensor.dtype.itemsize > 1 else torch.bfloat16
        if is_attention(name):
            result[name] = tensor.dtype
        elif is_quantizable(name) and format in QUANTIZED:
            result[name] = format
        elif was in INTEGERS and format in QUANTIZED:
            result[name] = was  # a quantized layer outside the ten: left as it is
        elif was is None and not isfloat:
            result[name] = tensor.dtype
        elif format in QUANTIZED:
            result[name] = dtype
        else:
            result[name] = torch.promote_types(dtype, FLOATS[format]) if is_delicate(name) else FLOATS[format]
    return result


def on_disk(plan: Plan, tensors: dict) -> Layout:
    """{name: (dtype, shape)} of every tensor on disk."""
    result = {}
    for name, kind in plan.items():
        shape = tuple(tensors[name].shape)
        if isinstance(kind, torch.dtype):
            result[name] = kind, shape
            continue
        scale = {"int8_block": block_scale_shape(*shape), "int8_row": (shape[0], 1), "fp8": ()}[kind]
        result[name] = torch.int8 if kind in INTEGERS else torch.float8_e4m3fn, shape
        result[f"{name}_scale"] = torch.float32, scale
        result[_comfy_quant_name(name)] = torch.uint8, tuple(_COMFY_QUANT[kind].shape)
    return result


def rewritten(source, tensors: dict, disk: Disk, plan: Plan, stored: dict[str, str], count):
    """Yield (name, tensor) as planned; calls count(bytes) after each has been taken.

    tensors: of the source, under official names; disk reads them. Raises TurboError naming the first tensor that holds
    NaN or infinity, or does not fit into float16, and where the source is cut short meanwhile.
    """
    for name, kind in plan.items():
        weight, scale = disk.read(tensors[name], again=True), tensors.get(f"{name}_scale")
        if scale is not None:
            scale = disk.read(scale)
            check_scale_values(f"{name}_scale", scale, source)
        for output, tensor in written_as(kind, name, weight, scale, stored.get(name), source).items():
            yield output, tensor
            count(tensor.nbytes)
        weight = scale = tensor = None  # before the next one comes


def while_unchanged(output, states: dict):
    """The output, and at its end an error where a source is no longer as it was. states: {path: files.state_of}."""
    yield from output
    for path, state in states.items():
        if not path.is_file() or state_of(path) != state:
            raise TurboError(
                f"{path} changed while it was read. Nothing was written: try again when it stays as it is."
            )


def written_as(kind, name, weight, scale, stored, path) -> dict:
    """{name on disk: tensor} of one weight as planned. stored: its layer_format; path: what errors name."""
    if isinstance(kind, torch.dtype):
        return {name: _cast(name, weight, scale, kind, path)}
    encode = _fp8 if kind == "fp8" else _integers
    weight, scale = encode(name, weight, scale, stored, kind, path)
    return {name: weight, f"{name}_scale": scale.float(), _comfy_quant_name(name): _COMFY_QUANT[kind]}


def _comfy_quant_name(name):
    return name.removesuffix("weight") + "comfy_quant"


def _cast(name, weight, scale, dtype, path):
    if is_attention(name) or not dtype.is_floating_point:
        return weight
    if weight.dtype.itemsize > 1:
        check_finite(name, weight, path)
    tensor = decode(weight, scale, dtype)
    if dtype == torch.float16 and tensor.dtype != weight.dtype and not is_finite(tensor):
        raise TurboError(
            f"{path}: {shown(name)} exceeds 65504, the largest float16. Expected smaller weights: convert to bf16."
        )
    check_finite(name, tensor, path)
    return tensor


def _integers(name, weight, scale, stored, kind, path):
    if stored != kind:
        if stored not in FLOATS:
            weight = decode(weight, scale, torch.float32)
        check_finite(name, weight, path)
        parts = zip(*(_QUANTIZERS[kind](slab) for slab in weight.split(_SLAB)))
        weight, scale = (torch.cat(part) for part in parts)
    return weight, scale


def is_encoded_anew(tensors: dict, name: str) -> bool:
    """True for a weight in fp8 that fp8 here cannot hold as it is: of another kind, or with a scale for each row."""
    weight, scale = tensors[name], tensors.get(f"{name}_scale")
    of_rows = scale is not None and len(scale) > 1 and scale.stride(0) != 0
    return weight.dtype in FP8 and (weight.dtype != torch.float8_e4m3fn or of_rows)


def _fp8(name, weight, scale, stored, kind, path):
    one_scale = scale is None or bool((scale == scale[0]).all())
    if stored == kind and weight.dtype == torch.float8_e4m3fn and one_scale:
        for slab in weight.split(_SLAB):
            check_finite(name, slab.float(), path)
        return weight, torch.ones(()) if scale is None else scale[0, 0].clone()
    if stored not in FLOATS:
        weight = decode(weight, scale, torch.float32)
    check_finite(name, weight, path)
    return encode_fp8(weight)
