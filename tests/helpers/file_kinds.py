"""Every kind of file that people have of a Wan model, made from a state dict; docs/files.md tabulates them."""

import json
from collections.abc import Callable
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from tests.helpers.diffusers_files import renamed, repacked, sharded
from tests.helpers.states import official
from turbo_core.checkpoint.names import is_quantizable
from turbo_core.int8 import quantize_block, quantize_rows

CONFIG = {"config": json.dumps({"transformer": {"num_heads": 2, "text_dim": 64}})}
SOL = b'[{"attention": "comfy_kitchen_sol", "tau": 1.0}]'
HOST = "ComfyUI's loader"


class Kind(NamedTuple):
    """make(state, folder) -> path. format: what inspect says, None where it refuses; loads: who loads a stock model of
    this kind in the node, None where a cure is told; cure: what a refusal says. error: of the weights, relative."""

    title: str
    make: Callable
    format: str | None
    loads: str | None = "Turbo Loader"
    cure: str = ""
    error: float = 0.0


def bytes_of(text) -> torch.Tensor:
    return torch.tensor(list(text if isinstance(text, bytes) else json.dumps(text).encode()), dtype=torch.uint8)


def _pth(change=lambda state: state, name="x.pth", **how):
    def make(state, folder):
        torch.save(change(state), folder / name, **how)
        return folder / name

    return make


def _safetensors(change=lambda state: state, name="x.safetensors", metadata=CONFIG):
    def make(state, folder):
        save_file({n: t.contiguous() for n, t in change(official(state)).items()}, folder / name, metadata)
        return folder / name

    return make


def _each(state, parts) -> dict:
    """The state with the ten linears of each block replaced. parts: a weight to {what stands after "X.": tensor}."""
    result = {}
    for name, tensor in state.items():
        layer = name.removesuffix("weight")
        made = {layer + part: t for part, t in parts(tensor).items()} if is_quantizable(name) else {name: tensor}
        result |= made
    return result


def _int8(quantize, weight="weight", scale="weight_scale", entry=None, flat=False):
    def parts(tensor):
        q, s = quantize(tensor.float())
        told = {} if entry is None else {"comfy_quant": bytes_of({"format": entry})}
        return {weight: q, scale: s.flatten() if flat else s, **told}

    return lambda state: _each(state, parts)


def _fp8(scale, entry=None, marker=False):
    def parts(tensor):
        value = tensor.float().abs().max() / 448 if scale else torch.ones(())
        told = {} if entry is None else {"comfy_quant": bytes_of({"format": entry})}
        told |= {scale: value} if scale else {}
        return {"weight": (tensor.float() / value).to(torch.float8_e4m3fn), **told}

    mark = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)} if marker else {}
    return lambda state: _each(state, parts) | mark


def _packed(entry, dtype, columns, scales):
    """As a format of ComfyUI's own lies in a file; the numbers mean nothing."""

    def parts(tensor):
        rows, cols = tensor.shape
        made = {"weight": torch.zeros(rows, cols // columns, dtype=dtype), "comfy_quant": bytes_of(entry)}
        return made | {part: torch.ones(rows, width, dtype=d) for part, width, d in scales}

    return lambda state: _each(state, parts)


def _shards(change):
    return lambda state, folder: sharded(change(state), folder / "model")


def _cast(dtype):
    return lambda state: {name: tensor.to(dtype) for name, tensor in state.items()}


def _prefixed(prefix):
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def _wrapped(state):
    return {n.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): t for n, t in state.items()}


def _one_shard(state, folder):
    return sorted(sharded(renamed(state), folder / "model").parent.glob("*.safetensors"))[1]


def _gguf(state, folder):
    (folder / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    return folder / "x.gguf"


_PACKED = {
    "int8_tensorwise with convrot": _packed(
        {"format": "int8_tensorwise", "convrot": True}, torch.int8, 1, [("weight_scale", 1, torch.float32)]
    ),
    "nvfp4": _packed({"format": "nvfp4"}, torch.uint8, 2, [("weight_scale", 16, torch.float8_e4m3fn)]),
    "mxfp8": _packed({"format": "mxfp8"}, torch.float8_e4m3fn, 1, [("weight_scale", 8, torch.uint8)]),
    "convrot_w4a4": _packed({"format": "convrot_w4a4"}, torch.int8, 2, [("weight_scale", 1, torch.float32)]),
    "asym_w4a8_int8": _packed(
        {"format": "asym_w4a8_int8"},
        torch.int8,
        2,
        [("weight_s_rel", 16, torch.uint8), ("weight_codebook", 1, torch.float32)],
    ),
}
_NO_READ = "which is not read here.*(?:Turbo Loader hands it|turbo-core convert)"
_WISH = {"blocks.0.self_attn.comfy_attention.config": bytes_of(SOL)}
KINDS = (
    Kind("`.pth` as published", _pth(), "bf16"),
    Kind("`-quant.pth` as published", _pth(_int8(quantize_block, "int8_weight", "scale")), "int8_block", error=0.02),
    Kind("`.pth` of an older torch, not zipped", _pth(_use_new_zipfile_serialization=False), "bf16"),
    Kind("`.pth` of a training, nested and with `net.`", _pth(lambda s: {"ema": _prefixed("net.")(s)}), "bf16"),
    Kind("`.pth` that was called `.safetensors`", _pth(name="x.safetensors"), "bf16"),
    Kind("safetensors that was called `.pth`", _safetensors(name="x.pth"), "bf16"),
    Kind("safetensors, bf16", _safetensors(), "bf16", HOST),
    Kind("safetensors, fp16", _safetensors(_cast(torch.float16)), "fp16", HOST, error=0.01),
    Kind("safetensors, fp32", _safetensors(_cast(torch.float32)), "fp32", HOST),
    Kind("`.pth` as published, rewritten as safetensors", lambda s, f: _save_flat(s, f), "bf16"),
    Kind("safetensors with `model.diffusion_model.`", _safetensors(_prefixed("model.diffusion_model.")), "bf16", HOST),
    Kind("safetensors with `diffusion_model.`", _safetensors(_prefixed("diffusion_model.")), "bf16"),
    Kind("keys with `_checkpoint_wrapped_module`", _safetensors(_wrapped), "bf16"),
    Kind("with `comfy_attention.config`", _safetensors(lambda s: s | _WISH), "bf16", HOST),
    Kind("fp8 without scales", _safetensors(_fp8(None)), "fp8", HOST, error=0.05),
    Kind(
        "fp8, `scale_weight` and `scaled_fp8`", _safetensors(_fp8("scale_weight", None, True)), "fp8", HOST, error=0.05
    ),
    Kind("fp8, `comfy_quant`", _safetensors(_fp8("weight_scale", "float8_e4m3fn")), "fp8", HOST, error=0.05),
    Kind("fp8, scales that nothing points out", _safetensors(_fp8("weight_scale")), "fp8", error=0.05),
    Kind("int8_block", _safetensors(_int8(quantize_block, entry="int8_block128")), "int8_block", error=0.02),
    Kind("int8_row", _safetensors(_int8(quantize_rows, entry="int8_tensorwise")), "int8_row", HOST, error=0.02),
    Kind("int8_row that nothing points out", _safetensors(_int8(quantize_rows, flat=True)), "int8_row", error=0.02),
    Kind("Diffusers' layout, one file", _safetensors(renamed), "bf16"),
    Kind("Diffusers' layout, shards and index", _shards(renamed), "bf16"),
    Kind("INT8 repack of it, blocks", _shards(repacked), "int8_block", error=0.02),
    Kind("INT8 repack of it, rows", _shards(lambda s: repacked(s, "int8_row")), "int8_row", error=0.02),
    *(Kind(name, _safetensors(change), name, HOST, _NO_READ) for name, change in _PACKED.items()),
    Kind("one shard alone", _one_shard, None, None, "open .*index.json"),
    Kind(
        "int8, the scale under another name",
        _safetensors(_int8(quantize_block, scale="SCB")),
        None,
        None,
        "SCB .* may be it",
    ),
    Kind("GGUF", _gguf, None, None, "ComfyUI-GGUF"),
)


def _save_flat(state, folder):
    """With the patch embedding in two axes, as published."""
    save_file({n: t.contiguous() for n, t in state.items()}, folder / "x.safetensors", CONFIG)
    return folder / "x.safetensors"
