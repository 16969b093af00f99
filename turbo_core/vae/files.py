"""Reading a Wan 2.1 VAE: Wan-AI's .pth, ComfyUI's repack, files under Diffusers' names; of any base width."""

import re

import torch

from ..checkpoint.read import open_tensors
from ..errors import TurboError, shown
from .network import LATENT_CHANNELS, WanVAE

_MARK = "decoder.middle.0.residual.0.gamma"
_DIFFUSERS_MARK = "decoder.mid_block.resnets.0.norm1.gamma"
_TINY_MARK = "decoder.3.conv.0.weight"
_CURE = "TurboWan needs the Wan 2.1 VAE: Wan2.1_VAE.pth from Wan-AI, or wan_2.1_vae.safetensors from Comfy-Org."
_RESIDUAL = {
    "residual.0.": "norm1.",
    "residual.2.": "conv1.",
    "residual.3.": "norm2.",
    "residual.6.": "conv2.",
    "shortcut.": "conv_shortcut.",
}


def load_vae(path, device="cpu", dtype=torch.float32) -> WanVAE:
    """The network with the weights of a Wan 2.1 VAE file (`Wan2.1_VAE.pth` or a safetensors repack), for inference.

    The base width is read from the file (96 in the published one). Raises TurboError for any other kind of VAE.
    """
    file = open_tensors(path)
    return build_vae(file.tensors, path, device, dtype, read=file.disk.read)


def build_vae(state: dict, path, device="cpu", dtype=torch.float32, kind=WanVAE, read=None) -> WanVAE:
    """The same of tensors by name; path names them in errors. kind: the class to make. read: brings a tensor from its
    file into memory."""
    diffusers = _check_kind(state, path)
    dim = _base_dim(state, "decoder.norm_out.gamma" if diffusers else "decoder.head.0.gamma", path)
    with torch.device("meta"):
        model = kind(dim)
    if diffusers:
        official = {diffusers_name(name): name for name in model.state_dict()}
        state = {official.get(name, name): value for name, value in state.items()}
    check_shapes(model, state, path)
    read = read or (lambda value: value)
    model.load_state_dict({key: read(value).to(device, dtype) for key, value in state.items()}, assign=True)
    return model.eval().requires_grad_(False)


def is_wan_vae(state: dict) -> bool:
    """True for the names of a Wan VAE, official or Diffusers'."""
    first = _first(state)
    return first is not None and first.ndim == 5 and (_MARK in state or _DIFFUSERS_MARK in state)


def _first(state: dict):
    return state.get("decoder.conv_in.weight", state.get("decoder.conv1.weight"))


def _check_kind(state: dict, path) -> bool:
    """Whether the names are Diffusers'. Raises TurboError for what is no Wan 2.1 VAE."""
    first = _first(state)
    if not is_wan_vae(state):
        kind = "an image VAE (SD, SDXL or Flux)" if first is not None and first.ndim == 4 else "not a Wan VAE"
        if _TINY_MARK in state:
            kind = "a tiny decoder (as it is in ComfyUI, by --vae-fast elsewhere)"
        raise TurboError(f"VAE: {path} is {kind}. {_CURE}")
    if first.shape[1] != LATENT_CHANNELS:
        kind = " (the VAE of Wan 2.2 5B)" if first.shape[1] == 48 else ""
        raise TurboError(f"VAE: {path} has {first.shape[1]} latent channels{kind}, expected {LATENT_CHANNELS}. {_CURE}")
    return _DIFFUSERS_MARK in state


def _base_dim(state: dict, name: str, path) -> int:
    if name not in state or state[name].ndim == 0:
        raise TurboError(f"VAE: {path} lacks {name}, or it is a single number. {_CURE}")
    return state[name].shape[0]


def check_shapes(model, state: dict, path, cure=_CURE) -> None:
    """Hold tensors by name to those of a model. Raises TurboError, which names the file and ends with the cure."""
    expected = {name: value.shape for name, value in model.state_dict().items()}
    missing, extra = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or extra:
        raise TurboError(
            f"VAE: {path} lacks {len(missing)} of {len(expected)} tensors and has {len(extra)} unknown ones, for "
            f"example {shown(min(missing | extra))}. {cure}"
        )
    for name in expected:
        if not state[name].is_floating_point():
            raise TurboError(f"VAE: {path}: {name} is {state[name].dtype}, expected floats. {cure}")
    wrong = [name for name, shape in expected.items() if state[name].shape != shape]
    if wrong:
        name = wrong[0]
        raise TurboError(
            f"VAE: {path}: {name} has shape {tuple(state[name].shape)}, expected {tuple(expected[name])}. {cure}"
        )


def diffusers_name(key: str) -> str:
    """The name in Diffusers' AutoencoderKLWan of a tensor under Wan's official name."""
    key = re.sub(r"^conv1\.", "quant_conv.", key)
    key = re.sub(r"^conv2\.", "post_quant_conv.", key)
    key = re.sub(r"coder\.conv1\.", "coder.conv_in.", key)
    key = re.sub(r"coder\.head\.0\.", "coder.norm_out.", key)
    key = re.sub(r"coder\.head\.2\.", "coder.conv_out.", key)
    key = key.replace(".middle.1.", ".mid_block.attentions.0.")
    key = re.sub(r"\.middle\.([02])\.", lambda match: f".mid_block.resnets.{int(match[1]) // 2}.", key)
    key = key.replace("encoder.downsamples.", "encoder.down_blocks.")
    # the decoder counts four entries a level: three residual blocks and an upsampler
    key = re.sub(r"decoder\.upsamples\.(\d{1,4})\.", lambda match: _up_block(int(match[1])), key)
    for official, theirs in _RESIDUAL.items():
        key = key.replace(f".{official}", f".{theirs}")
    return key


def _up_block(index: int) -> str:
    level, place = divmod(index, 4)
    return f"decoder.up_blocks.{level}.upsamplers.0." if place == 3 else f"decoder.up_blocks.{level}.resnets.{place}."
