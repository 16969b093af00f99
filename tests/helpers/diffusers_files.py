"""A state dict of the small family as Diffusers has it: other names, in a folder of shards with an index, in int8."""

import json
import re

import torch
from safetensors.torch import save_file

from tests.helpers.states import official
from turbo_core.checkpoint.names import is_quantizable
from turbo_core.int8 import quantize_block, quantize_rows

INDEX = "diffusion_pytorch_model.safetensors.index.json"
# written down here once more: the table under test must not test itself
_PAIRS = (
    (r"self_attn\.attn_op", "attn1.attn_op"),
    (r"self_attn\.([qkv])\b", r"attn1.to_\1"),
    (r"self_attn\.o\b", "attn1.to_out.0"),
    (r"self_attn\.", "attn1."),
    (r"cross_attn\.([qkv])\b", r"attn2.to_\1"),
    (r"cross_attn\.o\b", "attn2.to_out.0"),
    (r"cross_attn\.([kv])_img\b", r"attn2.add_\1_proj"),
    (r"cross_attn\.norm_k_img", "attn2.norm_added_k"),
    (r"cross_attn\.", "attn2."),
    (r"ffn\.0\.", "ffn.net.0.proj."),
    (r"ffn\.2\.", "ffn.net.2."),
    (r"norm3\.", "norm2."),
    (r"time_embedding\.0", "condition_embedder.time_embedder.linear_1"),
    (r"time_embedding\.2", "condition_embedder.time_embedder.linear_2"),
    (r"text_embedding\.0", "condition_embedder.text_embedder.linear_1"),
    (r"text_embedding\.2", "condition_embedder.text_embedder.linear_2"),
    (r"time_projection\.1", "condition_embedder.time_proj"),
    (r"img_emb\.proj\.0", "condition_embedder.image_embedder.norm1"),
    (r"img_emb\.proj\.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    (r"img_emb\.proj\.3", "condition_embedder.image_embedder.ff.net.2"),
    (r"img_emb\.proj\.4", "condition_embedder.image_embedder.norm2"),
    (r"head\.modulation|modulation", "scale_shift_table"),
    (r"head\.head", "proj_out"),
)


def renamed(state: dict) -> dict[str, torch.Tensor]:
    """The same tensors under Diffusers' names."""
    result = {}
    for name, tensor in official(state).items():
        theirs = next((re.sub(p, to, name, count=1) for p, to in _PAIRS if re.search(rf"(?:^|\.){p}", name)), name)
        assert theirs not in result, theirs
        result[theirs] = tensor.contiguous()
    return result


def repacked(state: dict, kind: str = "int8_block") -> dict[str, torch.Tensor]:
    """The INT8 repack: weight int8 and weight_scale_inv, by block or by row."""
    result = {}
    for name, tensor in state.items():
        if is_quantizable(name):
            tensor, scale = (quantize_block if kind == "int8_block" else quantize_rows)(tensor.float())
            result[f"{name}_scale_inv"] = scale
        result[name] = tensor
    return renamed(result)


def sharded(tensors: dict, folder, shards: int = 3):
    """The path of the index, after writing the tensors to so many shards in a new folder."""
    folder.mkdir()
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    places = {name: names[i * shards // len(tensors)] for i, name in enumerate(tensors)}
    for shard in names:
        save_file({n: tensors[n] for n, place in places.items() if place == shard}, folder / shard, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}))
    return folder / INDEX
