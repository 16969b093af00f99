"""What comes through a link has not passed the limits of the page: the same limits again, with the cure."""

import os
import pickle
import re
from numbers import Real

import comfy.utils
import folder_paths
import torch
from safetensors import SafetensorError

from ...turbo_core.errors import TurboError


def check_number(name, value, low, high):
    """Raise TurboError unless value is a number from low to high."""
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= value <= high:
        raise TurboError(f"{name} must be a number from {low} to {high}, got {value!r}: set it within that range.")


def check_choice(name, value, options):
    """Raise TurboError unless value is one of the options."""
    if value not in options:
        raise TurboError(f"{name} must be one of {', '.join(options)}, got {value!r}: choose one of them.")


def check_positive(positive, model):
    """Raise TurboError unless the conditioning holds what a Wan MODEL takes: text of its width, latents of its VAE."""
    if not positive:
        raise TurboError("positive holds no prompt: connect a CLIP Text Encode node, or what WanImageToVideo gives.")
    network = model.model.diffusion_model
    expected = network.text_dim
    room = network.patch_embedding.in_channels - model.get_model_object("latent_format").latent_channels
    for text, more in positive:
        if text.shape[-1] != expected:
            raise TurboError(
                f"positive comes from another text encoder: this model takes text of width {expected}, got "
                f"{text.shape[-1]}. Encode it with Wan's umT5 (Turbo Text Encoder Loader, CLIPLoader with type wan)."
            )
        image = more.get("concat_latent_image")
        # some control models have room for two or three latents of 16 channels; the VAE of the 5B model makes 48
        if image is not None and (image.shape[1] % 16 or room < image.shape[1] == 48):
            check_channels("the start image in positive", image.shape[1], model)


def check_latent(latent):
    """Raise TurboError unless this is a LATENT with a picture or a video in it."""
    samples = latent.get("samples") if isinstance(latent, dict) else None
    cure = "connect an empty video latent (EmptyHunyuanLatentVideo) or what WanImageToVideo gives."
    if samples is None:
        raise TurboError(f"latent_image holds no latent: {cure}")
    if samples.is_nested or samples.ndim not in (4, 5) or 0 in samples.shape:
        raise TurboError(
            "latent_image must be [batch, channels, frames, height, width], none of them 0, got "
            f"{list(samples.shape)}: {cure}"
        )


def check_channels(what, channels, model):
    """Raise TurboError unless this is the number of channels of the MODEL's VAE."""
    expected = model.get_model_object("latent_format").latent_channels
    if channels != expected:
        raise TurboError(
            f"{what} has {channels} channels, this model takes {expected}: it was made with another VAE, "
            "encode it with the VAE of this model (Wan 2.1's for all but the 5B model)."
        )


def model_file(kind, name):
    """Path of a file in models/`kind`. Raises TurboError where none is chosen, the host's error where it is gone."""
    if not isinstance(name, str) or not name.strip():
        raise TurboError(f"No file is chosen, got {name!r}: choose one that lies in models/{kind}.")
    return folder_paths.get_full_path_or_raise(kind, name)


def read_tensors(path):
    """(tensors, metadata) of a file as the host reads it. Raises TurboError for one that is damaged or no such file."""
    try:
        return comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TurboError(f"{path} is damaged, cut short or refused: {reason} Download the file again.") from error


def check_sigmas(sigmas):
    """Raise TurboError unless sigmas are a schedule: a row of numbers that falls from at most 1 to at least 0."""
    row = sigmas if isinstance(sigmas, torch.Tensor) and sigmas.ndim == 1 else torch.empty(0)
    falling = len(row) > 1 and bool((row[:-1] > row[1:]).all())
    if not falling or row[0] > 1 or row[-1] < 0:
        got = ", ".join(f"{sigma:.4g}" for sigma in row[:6].tolist()) or "none"
        raise TurboError(f"sigmas must fall from at most 1 to at least 0, got {got}: use Turbo Scheduler.")


def parse_blocks(text: str | None, count: int) -> frozenset[int]:
    """Block numbers in a text such as "0, 1, 38-39" or "first 2, last 1"; empty means none. Raises TurboError else."""
    blocks = set()
    for part in filter(None, (p.strip() for p in (text or "").split(","))):
        first, last = _range(part, count)
        if not 0 <= first <= last < count:
            raise TurboError(
                f"block list: {part!r} is not within 0 to {count - 1}; write it like "
                f'"0, 1, {count - 1}" or "first 2, last 1".'
            )
        blocks.update(range(first, last + 1))
    return frozenset(blocks)


def _range(part, count):
    """First and last block of one part; what cannot be read is an empty range."""
    if match := re.fullmatch(r"(first|last)\s*(\d+)", part.lower()):
        number = int(match[2])
        return (0, number - 1) if match[1] == "first" else (count - number, count - 1)
    match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part)
    return (int(match[1]), int(match[2] or match[1])) if match else (1, 0)


_FORBIDDEN = re.compile(r'[<>:"|?*\\\x00-\x1f]')
_RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}
_LONGEST = 200  # bytes of one part of a path: file systems hold 255, and a number, .safetensors and .part are added


def check_name(name):
    """Raise TurboError unless name, folders before it and all, can be written on Linux, macOS and Windows alike."""
    parts = name.replace(os.sep, "/").split("/")
    if parts[-1].strip(" .") == "":
        raise TurboError(f"{name!r} names no file: write a name, with folders before it if you like.")
    for part in parts:
        forbidden = _FORBIDDEN.search(part)
        if forbidden:
            raise TurboError(
                f"{name!r} holds {forbidden[0]!r}, which Windows does not allow in file names (nor any of "
                '< > : " | ? * \\ and control characters): leave it out. Folders are separated by /.'
            )
        if part.split(".")[0].rstrip().upper() in _RESERVED:
            raise TurboError(f"{name!r} holds {part!r}, a name that Windows keeps for a device: choose another one.")
        if part not in (".", "..") and part != part.rstrip(" ."):
            raise TurboError(f"{name!r}: {part!r} ends in a dot or a space, which Windows drops: leave it out.")
        if len(os.fsencode(part)) > _LONGEST:
            raise TurboError(f"{name[:40]!r}... is too long, more than {_LONGEST} bytes: choose a shorter name.")
