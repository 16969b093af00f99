"""What a checkpoint that is not a Wan diffusion model looks like, so that the refusal can say it."""

# (what it is, fragments that must all occur in some key); the first match wins
_SIGNATURES = (
    ("a LoRA. Load it with a LoRA node on top of a model", (".lora_A.",)),
    ("a LoRA. Load it with a LoRA node on top of a model", (".lora_down.",)),
    ("a LoRA. Load it with a LoRA node on top of a model", (".lora_up.",)),
    (
        "a Wan model in the diffusers layout. Use the file in the official layout, or ComfyUI's repack",
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


def looks_like(names) -> str | None:
    """A few words on what the keys of a foreign checkpoint belong to, None when unknown."""
    names = list(names)
    for kind, fragments in _SIGNATURES:
        if all(any(fragment in name for name in names) for fragment in fragments):
            return kind
    return None
