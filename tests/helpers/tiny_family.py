"""A complete small Wan family in the published file layouts, random weights from a seed."""

import itertools
import json
from pathlib import Path

import torch

from tests.helpers.tiny_dits import make_tiny_dits, save_pickle
from turbo_core.checkpoint.write import write_safetensors
from turbo_core.pipeline.text import OFFICIAL_BLOCK_NAMES
from turbo_core.tinywan.text import TEXT_CONFIG, tiny_text_encoder, train_tokenizer

VAE_DIM = 8


def make_tiny(folder, seed: int = 0) -> list[Path]:
    """Write the small family into folder, which is made, and return its paths; the same seed gives the same bytes.

    DiTs (see tiny_dits), tiny_wan_vae.safetensors and TinyWan2.1_VAE.pth (Wan 2.1 VAE, base width 8),
    tiny_umt5.safetensors (Hugging Face naming, tokenizer inside), tiny_umt5_enc.pth (Wan-AI naming) with
    spiece.model beside it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return [*make_tiny_dits(folder, seed), *_make_vae(folder, seed), *_make_text_encoder(folder, seed)]


def tiny_vae(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of a Wan 2.1 VAE of base width 8 under the official names, float32."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in _vae_shapes(VAE_DIM):
        if name.endswith("gamma"):
            state[name] = torch.ones(shape)
        elif name.endswith("bias"):
            state[name] = 0.1 * torch.randn(shape, generator=generator)
        else:
            fan_in = shape[1:].numel()
            state[name] = torch.randn(shape, generator=generator) * _gain(name) * fan_in**-0.5
    return state


def _make_vae(folder: Path, seed: int):
    state = tiny_vae(seed)
    yield _save_safetensors(state, folder / "tiny_wan_vae.safetensors")
    yield save_pickle(state, folder / "TinyWan2.1_VAE.pth")


def _make_text_encoder(folder: Path, seed: int):
    tokenizer = tiny_tokenizer()
    state = tiny_text_encoder(tokenizer, seed)
    yield _save_safetensors(state, folder / "tiny_umt5.safetensors", {"umt5xxl_model_config": TEXT_CONFIG})
    yield save_pickle(official_text_names(state), folder / "tiny_umt5_enc.pth")
    spiece = folder / "spiece.model"
    spiece.write_bytes(tokenizer)
    yield spiece


def tiny_tokenizer() -> bytes:
    """The sentencepiece model of the captions below."""
    return train_tokenizer(captions())


def captions() -> list[str]:
    """English captions of simple scenes, always the same ones."""
    subjects = ("a red circle", "a blue square", "a green triangle", "a yellow star", "two stylish cats", "a ship")
    verbs = ("moves left across", "spins slowly above", "bounces over", "walks through", "drifts toward", "grows by")
    places = ("a white background", "the quiet sea at sunset", "a dark city street in the rain", "high mountains")
    styles = ("Cinematic, warm light.", "Close-up shot, 35mm film.", "Watercolor, soft focus.", "Highly detailed.")
    scenes = [" ".join(parts) + "." for parts in itertools.product(subjects, verbs, places)]
    return [f"{scene} {styles[i % len(styles)]}" for i, scene in enumerate(scenes)]


def official_text_names(state: dict) -> dict[str, torch.Tensor]:
    """A umT5 state dict under Wan-AI's names, without tokenizer and marker."""
    renamed = {"token_embedding.weight": state["shared.weight"]}
    renamed["norm.weight"] = state["encoder.final_layer_norm.weight"]
    for index in range(TEXT_CONFIG["num_layers"]):
        for official, name in OFFICIAL_BLOCK_NAMES.items():
            renamed[f"blocks.{index}.{official}.weight"] = state[f"encoder.block.{index}.{name}.weight"]
    return renamed


def _save_safetensors(state: dict, path: Path, config: dict | None = None) -> Path:
    metadata = {"format": "pt"} | ({"config": json.dumps(config)} if config else {})
    write_safetensors(path, state, metadata)
    return path


def _gain(name: str) -> float:
    """Weight scale that keeps activations near one through random layers, and the image within [-1, 1]."""
    if name.startswith("decoder.head"):
        return 0.8
    return 1.0 if name.startswith("conv") or ".conv1" in name else 1.4


def _vae_shapes(dim: int):
    """(official name, shape) of every tensor of a Wan 2.1 VAE of this base width."""
    widths = [dim, dim * 2, dim * 4, dim * 4]
    yield from _conv("encoder.conv1", dim, 3, 3, 3, 3)
    index, width = 0, dim
    for level, out in enumerate(widths):
        for _ in range(2):
            yield from _residual(f"encoder.downsamples.{index}", width, out)
            index, width = index + 1, out
        if level < 3:
            yield from _conv(f"encoder.downsamples.{index}.resample.1", out, out, 3, 3)
            if level > 0:  # the first level halves space only
                yield from _conv(f"encoder.downsamples.{index}.time_conv", out, out, 3, 1, 1)
            index += 1
    yield from _middle_and_head("encoder", width, width, 32)
    yield from _conv("conv1", 32, 32, 1, 1, 1)
    yield from _conv("conv2", 16, 16, 1, 1, 1)

    yield from _conv("decoder.conv1", width, 16, 3, 3, 3)
    index = 0
    for level, out in enumerate(reversed(widths)):
        for _ in range(3):
            yield from _residual(f"decoder.upsamples.{index}", width, out)
            index, width = index + 1, out
        if level < 3:
            yield from _conv(f"decoder.upsamples.{index}.resample.1", out // 2, out, 3, 3)
            if level < 2:  # the last level doubles space only
                yield from _conv(f"decoder.upsamples.{index}.time_conv", out * 2, out, 3, 1, 1)
            index, width = index + 1, out // 2
    yield from _middle_and_head("decoder", dim * 4, dim, 3)


def _middle_and_head(side: str, middle: int, width: int, out: int):
    yield from _residual(f"{side}.middle.0", middle, middle)
    yield f"{side}.middle.1.norm.gamma", torch.Size((middle, 1, 1))
    yield from _conv(f"{side}.middle.1.to_qkv", middle * 3, middle, 1, 1)
    yield from _conv(f"{side}.middle.1.proj", middle, middle, 1, 1)
    yield from _residual(f"{side}.middle.2", middle, middle)
    yield f"{side}.head.0.gamma", torch.Size((width, 1, 1, 1))
    yield from _conv(f"{side}.head.2", out, width, 3, 3, 3)


def _residual(name: str, width: int, out: int):
    yield f"{name}.residual.0.gamma", torch.Size((width, 1, 1, 1))
    yield from _conv(f"{name}.residual.2", out, width, 3, 3, 3)
    yield f"{name}.residual.3.gamma", torch.Size((out, 1, 1, 1))
    yield from _conv(f"{name}.residual.6", out, out, 3, 3, 3)
    if width != out:
        yield from _conv(f"{name}.shortcut", out, width, 1, 1, 1)


def _conv(name: str, out: int, width: int, *kernel: int):
    yield f"{name}.weight", torch.Size((out, width, *kernel))
    yield f"{name}.bias", torch.Size((out,))
