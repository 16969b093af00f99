"""Tiny Wan diffusion models in the published file formats: random weights from a seed."""

import json
import math
import re
from pathlib import Path

import torch

from turbo_core.checkpoint.names import PROJ_L, is_delicate, is_quantizable
from turbo_core.checkpoint.shapes import Sizes, expected_shapes
from turbo_core.checkpoint.write import write_safetensors
from turbo_core.int8 import quantize_block

# heads of 128, so that ComfyUI counts them right by itself; text_dim fits the tiny umT5
TINY = Sizes(dim=256, in_dim=16, out_dim=16, ffn_dim=512, text_dim=64, freq_dim=256, head_dim=128)
# both edges of its int8 blocks are ragged; 3 heads of 64
RAGGED = Sizes(dim=192, in_dim=16, out_dim=16, ffn_dim=200, text_dim=24, freq_dim=40, head_dim=64)
TINY_BLOCKS = 2
_NORM = re.compile(r"\.norm(?:3|_q|_k)\.")
STOCK = "tiny_wan_stock_bf16.safetensors"


def make_tiny_dits(folder: Path, seed: int = 0) -> list[Path]:
    """Write a tiny family of diffusion models into an existing folder and return the paths.

    TinyWan2.1-T2V, TinyWan2.2-I2V-high and -low as .pth, each also as -quant.pth (flat dictionaries under bare keys,
    2-D patch embedding, as published), and tiny_wan_stock_bf16.safetensors, the text-to-video model without proj_l in
    ComfyUI's naming. dim 256, 2 heads, 2 blocks. The same seed gives the same bytes.
    """
    t2v = tiny_state_dict(seed)
    image = TINY._replace(in_dim=36)
    published = {
        "TinyWan2.1-T2V": t2v,
        "TinyWan2.2-I2V-high": tiny_state_dict(seed + 1, image),
        "TinyWan2.2-I2V-low": tiny_state_dict(seed + 2, image),
    }
    paths = [
        save_pickle(content, folder / f"{name}{suffix}.pth")
        for name, state in published.items()
        for suffix, content in (("", state), ("-quant", _published_quant(state)))
    ]
    stock = {name: tensor for name, tensor in t2v.items() if PROJ_L not in name}
    stock["patch_embedding.weight"] = stock["patch_embedding.weight"].reshape(TINY.dim, TINY.in_dim, 1, 2, 2)
    config = json.dumps({"transformer": {"num_heads": TINY.dim // TINY.head_dim, "text_dim": TINY.text_dim}})
    write_safetensors(folder / STOCK, stock, {"format": "pt", "config": config})
    return [*paths, folder / STOCK]


def tiny_state_dict(seed: int, sizes: Sizes = TINY, blocks: int = TINY_BLOCKS) -> dict[str, torch.Tensor]:
    """A random model as published unquantized: bare keys, 2-D patch embedding, bf16, proj_l float32.

    Weights have a standard deviation of 1 / sqrt(inputs), more where a nonlinearity takes some away, so that
    activations and the velocity stay near one, every block moves them, and proj_l is felt.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in expected_shapes(blocks, True, sizes).items():
        x = random_weight(name, shape, generator, sizes.dim)
        state[name] = x if PROJ_L in name else x.bfloat16()
    state["patch_embedding.weight"] = state["patch_embedding.weight"].flatten(1)
    return state


def unquantized(state: dict, rest: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A state dict in the dtypes of the published unquantized 1.3B file: the six norm tensors of each block float32,
    everything else bf16, proj_l, modulation and embeddings too. rest: float32 for the same values in float32."""
    return {n: t.bfloat16().to(torch.float32 if _NORM.search(n) else rest) for n, t in state.items()}


def random_weight(name, shape, generator, dim):
    """Random values for a tensor of a Wan network, or one that names its parts like it; float32."""
    x = torch.randn(shape, generator=generator)
    if name.endswith("modulation"):
        return x * dim**-0.5
    if len(shape) < 2:
        return x * 0.1 + (1 if name.endswith("weight") else 0) if "norm" in name else x * 0.05
    after_activation = name.endswith((".2.weight", "time_projection.1.weight"))
    return x * ((2 if after_activation else 1) * math.prod(shape[1:]) ** -0.5)


def _published_quant(state):
    """The -quant file of a state dict: ten linears per block as int8_weight and scale, norms in float32."""
    result = {}
    for name, tensor in state.items():
        layer = name.removesuffix(".weight")
        if is_quantizable(name):
            result[f"{layer}.int8_weight"], result[f"{layer}.scale"] = quantize_block(tensor)
        else:
            result[name] = tensor.float() if is_delicate(name) and "modulation" not in name else tensor
    return result


def save_pickle(state: dict, path: Path) -> Path:
    with open(path, "wb") as file:  # an open file: the name would become part of the archive
        torch.save(state, file)
    return path
