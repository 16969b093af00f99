"""The names of a Wan model in Diffusers' layout, for whole models and for LoRAs.

Source: scripts/convert_wan_to_diffusers.py of https://github.com/huggingface/diffusers.
"""

import re

MARK = "condition_embedder.time_proj.weight"  # a tensor that Wan models in this layout have, and no other model
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_ATTENTION["comfy_attention"] = "comfy_attention"
_IN_BLOCK = {  # official name of a layer of a block: its name there
    **{f"self_attn.{ours}": f"attn1.{theirs}" for ours, theirs in _ATTENTION.items()},
    **{f"cross_attn.{ours}": f"attn2.{theirs}" for ours, theirs in _ATTENTION.items()},
    "self_attn.attn_op.local_attn.proj_l": "attn1.attn_op.local_attn.proj_l",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
    "before_proj": "proj_in",  # of VACE
    "after_proj": "proj_out",
}
_OUTSIDE = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
}
_TENSORS = {  # no layer's weight or bias
    "scale_shift_table": "head.modulation",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
}
_OFFICIAL = {theirs: ours for ours, theirs in _IN_BLOCK.items()} | {"scale_shift_table": "modulation"}
_OFFICIAL_OUTSIDE = {theirs: ours for ours, theirs in _OUTSIDE.items()} | _TENSORS
_BLOCK = re.compile(r"((?:vace_)?blocks\.\d+\.)(.+)")


def layer_name(layer: str) -> str | None:
    """What Diffusers calls an official layer ("blocks.0.self_attn.q"), None where it has no name of its own there."""
    block = _BLOCK.fullmatch(layer)
    if block is None:
        return _OUTSIDE.get(layer)
    return block[1] + _IN_BLOCK[block[2]] if block[2] in _IN_BLOCK else None


def official_name(name: str) -> str:
    """The official name of a tensor; what the layout does not know keeps its name."""
    block = _BLOCK.fullmatch(name)
    prefix, rest, known = (block[1], block[2], _OFFICIAL) if block else ("", name, _OFFICIAL_OUTSIDE)
    if rest in known:
        return prefix + known[rest]
    layer, _, part = rest.rpartition(".")
    return f"{prefix}{known[layer]}.{part}" if layer in known else name
