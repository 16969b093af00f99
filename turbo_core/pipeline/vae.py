"""The Wan 2.1 VAE: videos to normalized latents and back, computed by diffusers' AutoencoderKLWan."""

import re

import torch

from ..checkpoint.read import open_tensors
from ..errors import TurboError, missing_library, shown

LATENT_CHANNELS = 16
# Per-channel statistics of the latents; the DiT works on (latent - mean) / std. Published with the Wan 2.1 VAE.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
_MARK = "decoder.middle.0.residual.0.gamma"
_DIFFUSERS_MARK = "decoder.mid_block.resnets.0.norm1.gamma"
_CURE = "TurboWan needs the Wan 2.1 VAE: Wan2.1_VAE.pth from Wan-AI, or wan_2.1_vae.safetensors from Comfy-Org."
_RESIDUAL = {
    "residual.0.": "norm1.",
    "residual.2.": "conv1.",
    "residual.3.": "norm2.",
    "residual.6.": "conv2.",
    "shortcut.": "conv_shortcut.",
}


def load_vae(path, device="cpu", dtype=torch.float32):
    """AutoencoderKLWan with the weights of a Wan 2.1 VAE file (`Wan2.1_VAE.pth` or a safetensors repack).

    The base width is read from the file (96 in the published one). Raises TurboError for any other kind of VAE.
    """
    state = _canonical(open_tensors(path).tensors, path)
    with torch.device("meta"):
        model = _model_class()(base_dim=_base_dim(state, path), z_dim=LATENT_CHANNELS)
    _check_shapes(model, state, path)
    model.load_state_dict({key: value.to(device, dtype) for key, value in state.items()}, assign=True)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def encode_video(vae, video: torch.Tensor) -> torch.Tensor:
    """Normalized latents [B, 16, (T-1)/4+1, H/8, W/8] float32 of a video [B, 3, T, H, W] in [-1, 1].

    The mean of the posterior is taken, nothing is sampled.
    """
    latent = vae.encode(video.to(vae.device, vae.dtype)).latent_dist.mode().float()
    mean, std = _statistics(latent)
    return (latent - mean) / std


@torch.no_grad()
def decode_video(vae, latent: torch.Tensor, tiled: bool = False) -> torch.Tensor:
    """Video [B, 3, 4(T-1)+1, 8H, 8W] float32 in [-1, 1] of normalized latents [B, 16, T, H, W].

    tiled: decode in overlapping 256-pixel tiles, which needs a fraction of the memory and blends their seams.
    """
    mean, std = _statistics(latent)
    vae.use_tiling = tiled
    return vae.decode((latent.float() * std + mean).to(vae.device, vae.dtype)).sample.float()


def _statistics(like: torch.Tensor):
    values = (torch.tensor(row, device=like.device).view(1, -1, 1, 1, 1) for row in (LATENT_MEAN, LATENT_STD))
    return tuple(values)


def _model_class():
    try:
        from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    except ImportError as error:
        raise missing_library("diffusers (0.33 or newer)", "The Wan VAE") from error
    return AutoencoderKLWan


def _canonical(state: dict, path) -> dict:
    """The state dict under diffusers' names."""
    first = state.get("decoder.conv_in.weight", state.get("decoder.conv1.weight"))
    if first is None or first.ndim != 5 or not (_MARK in state or _DIFFUSERS_MARK in state):
        kind = "an image VAE (SD, SDXL or Flux)" if first is not None and first.ndim == 4 else "not a Wan VAE"
        raise TurboError(f"VAE: {path} is {kind}. {_CURE}")
    if first.shape[1] != LATENT_CHANNELS:
        kind = " (the VAE of Wan 2.2 5B)" if first.shape[1] == 48 else ""
        raise TurboError(f"VAE: {path} has {first.shape[1]} latent channels{kind}, expected {LATENT_CHANNELS}. {_CURE}")
    return state if _DIFFUSERS_MARK in state else {diffusers_name(key): value for key, value in state.items()}


def _base_dim(state: dict, path) -> int:
    name = "decoder.norm_out.gamma"
    if name not in state or state[name].ndim == 0:
        raise TurboError(f"VAE: {path} lacks {name}, or it is a single number. {_CURE}")
    return state[name].shape[0]


def _check_shapes(model, state: dict, path) -> None:
    expected = {name: value.shape for name, value in model.state_dict().items()}
    missing, extra = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or extra:
        raise TurboError(
            f"VAE: {path} lacks {len(missing)} of {len(expected)} tensors and has {len(extra)} unknown ones, for "
            f"example {shown(min(missing | extra))}. {_CURE}"
        )
    for name in expected:
        if not state[name].is_floating_point():
            raise TurboError(f"VAE: {path}: {name} is {state[name].dtype}, expected floats. {_CURE}")
    wrong = [name for name, shape in expected.items() if state[name].shape != shape]
    if wrong:
        name = wrong[0]
        raise TurboError(
            f"VAE: {path}: {name} has shape {tuple(state[name].shape)}, expected {tuple(expected[name])}. {_CURE}"
        )


def diffusers_name(key: str) -> str:
    """The name in AutoencoderKLWan of a tensor under Wan's official name."""
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
    for official, ours in _RESIDUAL.items():
        key = key.replace(f".{official}", f".{ours}")
    return key


def _up_block(index: int) -> str:
    level, place = divmod(index, 4)
    return f"decoder.up_blocks.{level}.upsamplers.0." if place == 3 else f"decoder.up_blocks.{level}.resnets.{place}."
