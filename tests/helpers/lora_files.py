"""LoRA files in the spellings and kinds that people have, for layers of the small family."""

import torch

from tests.helpers.lab import PROJ_L

RANK, ALPHA = 4, 8.0
LAYERS = ["blocks.0.self_attn.q", "blocks.0.cross_attn.o", "blocks.1.ffn.0", "blocks.1.ffn.2"]
DIFFUSERS = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.0.cross_attn.o": "blocks.0.attn2.to_out.0",
    "blocks.1.ffn.0": "blocks.1.ffn.net.0.proj",
    "blocks.1.ffn.2": "blocks.1.ffn.net.2",
}


def underscored(prefix):
    return lambda layer: prefix + layer.replace(".", "_")


def factors(lab, layer, network):
    rows, cols = network.get_submodule(layer).weight.shape
    seed = 2 * LAYERS.index(layer)
    return lab.draw(RANK, cols, seed=seed) * cols**-0.5, lab.draw(rows, RANK, seed=seed + 1) * 0.3


# spelling: (layer -> name, down, up, alpha in the file, read by the host's own nodes)
SPELLINGS = {
    "kohya": (underscored("lora_unet_"), "lora_down.weight", "lora_up.weight", True, True),
    "Wan Fun": (underscored("lora_unet__"), "lora_down.weight", "lora_up.weight", True, False),
    "ComfyUI, lightx2v": (lambda n: f"diffusion_model.{n}", "lora_down.weight", "lora_up.weight", True, True),
    "diffusion-pipe": (lambda n: f"diffusion_model.{n}", "lora_A.weight", "lora_B.weight", False, True),
    "DiffSynth": (lambda n: n, "lora_A.default.weight", "lora_B.default.weight", False, False),
    "PEFT": (lambda n: f"base_model.model.{n}", "lora_A.weight", "lora_B.weight", False, False),
    "PEFT, named": (lambda n: f"base_model.model.{n}", "lora_A.mine.weight", "lora_B.mine.weight", False, False),
    "diffusers": (lambda n: f"transformer.{DIFFUSERS[n]}", "lora_A.weight", "lora_B.weight", False, False),
    "diffusers, low noise": (lambda n: f"transformer_2.{DIFFUSERS[n]}", "lora_A.weight", "lora_B.weight", False, False),
    "diffusers, old": (lambda n: f"transformer.{DIFFUSERS[n]}", "lora.down.weight", "lora.up.weight", False, False),
    "SimpleTuner": (lambda n: underscored("lycoris_")(DIFFUSERS[n]), "lora_down.weight", "lora_up.weight", True, False),
}


def spelled(lab, network, spelling):
    name, down, up, alpha, _ = SPELLINGS[spelling]
    lora = {}
    for layer in LAYERS:
        first, second = factors(lab, layer, network)
        lora[f"{name(layer)}.{down}"], lora[f"{name(layer)}.{up}"] = first, second
        if alpha:
            lora[f"{name(layer)}.alpha"] = torch.tensor(ALPHA)
    return lora


def loha(lab, network):
    lora = {}
    for layer in LAYERS:
        rows, cols = network.get_submodule(layer).weight.shape
        first, second = factors(lab, layer, network)
        name = f"lora_unet_{layer.replace('.', '_')}"
        lora |= {f"{name}.hada_w1_a": second, f"{name}.hada_w1_b": first * cols**0.5}
        lora |= {f"{name}.hada_w2_a": lab.draw(rows, RANK, seed=70) * 0.3, f"{name}.hada_w2_b": first}
        lora[f"{name}.alpha"] = torch.tensor(float(RANK))
    return lora


def lokr(lab, network, low=True):
    lora = {}
    for seed, layer in enumerate(LAYERS):
        rows, cols = network.get_submodule(layer).weight.shape
        name = f"lora_unet_{layer.replace('.', '_')}"
        lora[f"{name}.lokr_w1"] = lab.draw(4, 4, seed=seed) * 0.5
        if low:
            lora[f"{name}.lokr_w2_a"] = lab.draw(rows // 4, RANK, seed=seed + 1)
            lora[f"{name}.lokr_w2_b"] = lab.draw(RANK, cols // 4, seed=seed + 2) * cols**-0.5
        else:
            lora[f"{name}.lokr_w2"] = lab.draw(rows // 4, cols // 4, seed=seed + 1) * cols**-0.5
        lora[f"{name}.alpha"] = torch.tensor(float(RANK))
    return lora


def dora(lab, network):
    lora = spelled(lab, network, "kohya")
    for layer in LAYERS:
        norm = network.get_submodule(layer).weight.float().norm(dim=1, keepdim=True)
        lora[f"lora_unet_{layer.replace('.', '_')}.dora_scale"] = norm * (1 + 0.2 * lab.draw(len(norm), 1, seed=3))
    return lora


def differences(lab, network):
    """As extracted from a finetune: biases, norms, modulation and whole weights beside the low-rank part."""
    lora = spelled(lab, network, "ComfyUI, lightx2v")
    for i, layer in enumerate(LAYERS):
        bias = network.get_submodule(layer).bias
        lora[f"diffusion_model.{layer}.diff_b"] = lab.draw(*bias.shape, seed=30 + i) * 0.1
    lora["diffusion_model.blocks.0.norm3.diff"] = lab.draw(256, seed=40) * 0.1
    lora["diffusion_model.blocks.0.norm3.diff_b"] = lab.draw(256, seed=41) * 0.1
    lora["diffusion_model.blocks.0.self_attn.norm_q.diff"] = lab.draw(256, seed=42) * 0.1
    lora["diffusion_model.blocks.1.self_attn.k.diff"] = lab.draw(256, 256, seed=43) * 0.02
    lora["diffusion_model.blocks.1.modulation.diff"] = lab.draw(1, 6, 256, seed=44) * 0.05
    lora["diffusion_model.head.head.diff_b"] = lab.draw(64, seed=45) * 0.1
    return lora


def plain(lab, network):
    """The usual kind, on proj_l as well."""
    lora = spelled(lab, network, "diffusion-pipe")
    lora[f"{PROJ_L}.lora_A.weight"] = lab.draw(RANK, 128, seed=60) * 128**-0.5
    lora[f"{PROJ_L}.lora_B.weight"] = lab.draw(128, RANK, seed=61) * 0.3
    return lora


MAKERS = {
    "LoRA": plain,
    "LoHa": loha,
    "LoKr": lokr,
    "LoKr, full": lambda *a: lokr(*a, low=False),
    "DoRA": dora,
    "diff": differences,
}
