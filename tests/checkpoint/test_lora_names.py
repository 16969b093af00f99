"""Names in LoRA files: which layer, which part, and which are refused."""

import time

import pytest

from turbo_core.checkpoint.lora_names import in_comfyui_names, spellings, split_name, why_not

LAYERS = [
    *(f"blocks.{i}.{kind}.{x}" for i in range(2) for kind in ("self_attn", "cross_attn") for x in "qkvo"),
    "blocks.1.ffn.0",
    "blocks.1.norm3",
    "head.head",
    "time_projection.1",
]


@pytest.mark.parametrize(
    ("name", "layer", "part"),
    [
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "blocks.0.self_attn.q", "lora_A.weight"),
        ("lora_unet_blocks_0_self_attn_q.lora_down.weight", "blocks_0_self_attn_q", "lora_down.weight"),
        ("lora_unet__blocks_0_self_attn_q.alpha", "blocks_0_self_attn_q", "alpha"),
        ("base_model.model.blocks.0.ffn.0.lora_B.default.weight", "blocks.0.ffn.0", "lora_B.default.weight"),
        ("transformer_2.blocks.0.attn1.to_q.lora.up.weight", "blocks.0.attn1.to_q", "lora.up.weight"),
        ("transformer.blocks.0.attn1.to_q_lora.up.weight", "blocks.0.attn1.to_q", "lora.up.weight"),
        ("blocks.0.norm3.diff_b", "blocks.0.norm3", "diff_b"),
        ("lycoris_blocks_0_attn1_to_q.lokr_w2_a", "blocks_0_attn1_to_q", "lokr_w2_a"),
        ("blocks.0.self_attn.q.weight", "blocks.0.self_attn.q.weight", ""),
    ],
)
def test_split(name, layer, part):
    assert split_name(name) == (layer, part)


def test_every_spelling_leads_to_one_layer():
    written = [name for layer in LAYERS for name in spellings(layer)]
    assert len(set(written)) == len(written)
    names = {f"transformer.{spelling}.alpha": layer for layer in LAYERS for spelling in spellings(layer)}
    assert in_comfyui_names(names, LAYERS) == {n: f"diffusion_model.{layer}.alpha" for n, layer in names.items()}


def test_adapter_names_go_and_foreign_tensors_stay_out():
    name = "base_model.model.blocks.0.self_attn.q.lora_A.mine.weight"
    foreign = ["lora_te_blocks_0_self_attn_q.alpha", "blocks.5.self_attn.q.alpha", "blocks.0.self_attn.q.weight"]
    found = in_comfyui_names([name, *foreign], LAYERS)
    assert found == {name: "diffusion_model.blocks.0.self_attn.q.lora_A.weight"}


def test_reasons():
    names = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": "text encoder",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": "text encoder",
        "lora_unet_single_blocks_0_linear1.alpha": "Flux",
        "transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight": "Qwen-Image",
        "diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight": "LTX",
        "lora_unet_down_blocks_0_attentions_0_proj_in.alpha": "SDXL",
        "lora_unet_input_blocks_1_1_proj_in.alpha": "SDXL",
        "lora_unet_joint_blocks_0_x_block_attn_qkv.alpha": "Stable Diffusion 3",
        "diffusion_model.layers.0.attention.to_q.lora_A.weight": "Lumina",
        "lora_unet_blocks_39_ffn_0.alpha": "more blocks; this one has 2",
        "diffusion_model.blocks.0.cross_attn.k_img.diff_b": "image branch",
        "diffusion_model.blocks.0.self_attn.q.lora_magnitude_vector": "PEFT",
        "diffusion_model.vace_blocks.0.after_proj.lora_A.weight": "layer that this model does not have",
        "diffusion_model.blocks.0.self_attn.q": "kind that is unknown",
    }
    for why, found in why_not(names, LAYERS).items():
        for name in found:
            assert names[name] in why, (name, why)


@pytest.mark.parametrize(
    "bit", [".lora_magnitude_vector", "_lokr_a", "_oft_b", "lora_unet_", "blocks.", ".lora_A", "9"]
)
@pytest.mark.parametrize("end", ["", ".", "\n"])
def test_a_name_of_100_kb_takes_no_time(bit, end):
    """An expression that tries every start and every end took 9 seconds."""
    name, began = "blocks." + bit * (100_000 // len(bit)) + end, time.process_time()
    split_name(name)
    assert (
        not in_comfyui_names([name], ["blocks.0.ffn.0"])
        and sum(map(len, why_not([name], ["blocks.0.ffn.0"]).values())) == 1
    )
    assert time.process_time() - began < 2
