"""Inputs of nodes: those that several have, and checks of all.

What comes through a link has not passed the limits of the page: the same limits again, with the cure.
"""

import re
from numbers import Real

import comfy.ldm.wan.model as wan
import torch
from comfy_api.latest import io

from ...turbo_core.errors import TurboError, quoted
from ...turbo_core.schedule import MOST_STEPS

MAX_SEED = 2**64 - 1


def seed_input(tooltip, changes=True):
    """For GuidedRun, which checks it. changes: the page offers to change it after each run."""
    limits = {"default": 0, "min": 0, "max": MAX_SEED}
    return io.Int.Input("seed", control_after_generate=changes or None, tooltip=tooltip, **limits)


_STEPS = "4 is best, 1 is fastest. More than 4 take longer at times that the model was not trained for."


def steps_input(tooltip=_STEPS):
    """For sigmas_of, which checks it."""
    return io.Int.Input("steps", default=4, min=1, max=MOST_STEPS, tooltip=tooltip)


def sigma_max_input():
    """For sigmas_of, which checks it."""
    return io.Float.Input(
        "sigma_max",
        default=0.0,
        min=0.0,
        max=1600.0,
        step=1.0,
        tooltip="Noise level of the first step. 0: what the model was distilled with, 80 for T2V and 200 for I2V. "
        "Higher (up to 1600) is sharper and less varied.",
    )


def network_of(model, node) -> torch.nn.Module:
    """The network of any MODEL. Raises TurboError naming the node where there is none."""
    network = getattr(getattr(model, "model", None), "diffusion_model", None)
    if network is None:
        raise TurboError(f"{node} got no MODEL but {type(model).__name__}: connect one, from Turbo Loader for example.")
    return network


def wan_network(model, node, otherwise="") -> wan.WanModel:
    """The network of a Wan MODEL. Raises TurboError naming the node, and another way out, for any other."""
    network = network_of(model, node)
    if not isinstance(network, wan.WanModel):
        cure = ", ".join(filter(None, ["connect a Wan MODEL", otherwise]))
        raise TurboError(f"{node} expects a Wan model, got {type(network).__name__}: {cure}.")
    return network


def check_number(name, value, low, high):
    """Raise TurboError unless value is a number from low to high."""
    if not isinstance(value, Real) or isinstance(value, bool) or not low <= value <= high:
        raise TurboError(
            f"{name} must be a number from {low} to {high}, got {quoted(value)}: set it within that range."
        )


def check_choice(name, value, options):
    """Raise TurboError unless value is one of the options."""
    if value not in options:
        raise TurboError(f"{name} must be one of {', '.join(options)}, got {quoted(value)}: choose one of them.")


def parse_blocks(text: str | None, count: int) -> frozenset[int]:
    """Block numbers in a text such as "0, 1, 38-39" or "first 2, last 1"; empty means none. Raises TurboError else."""
    blocks = set()
    for part in filter(None, (p.strip() for p in (text or "").split(","))):
        first, last = _range(part, count)
        if not 0 <= first <= last < count:
            raise TurboError(
                f"block list: {quoted(part)} is not within 0 to {count - 1}; write it like "
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


def check_sigmas(sigmas):
    """Raise TurboError unless sigmas are a schedule: a row of numbers that falls from at most 1 to at least 0."""
    row = sigmas if isinstance(sigmas, torch.Tensor) and sigmas.ndim == 1 else torch.empty(0)
    falling = len(row) > 1 and bool((row[:-1] > row[1:]).all())
    if not falling or row[0] > 1 or row[-1] < 0:
        got = ", ".join(f"{sigma:.4g}" for sigma in row[:6].tolist()) or "none"
        raise TurboError(f"sigmas must fall from at most 1 to at least 0, got {got}: use Turbo Scheduler.")


def check_image(model, positive):
    """Raise TurboError for an image-to-video MODEL, one with room for a picture, whose prompt comes without one."""
    latent = model.get_model_object("latent_format").latent_channels
    # a latent, a picture of as many channels, and a mask of 4; control models have other rooms
    pictured = latent == 16 and model.model.diffusion_model.patch_embedding.in_channels == 2 * latent + 4
    given = {name for _, more in positive or () for name in more}
    if pictured and not given & {"concat_latent_image", "reference_latents"}:  # HuMo's picture is the latter
        raise no_picture()


def no_picture(file="This"):
    """The TurboError of an image-to-video model whose prompt comes without a picture."""
    return TurboError(
        f"{file} is an image-to-video model and got no picture: connect positive and latent of WanImageToVideo, or "
        "take a text-to-video model."
    )


def check_positive(positive, model):
    """Raise TurboError unless the conditioning holds what a Wan MODEL takes: text of its width, latents of its VAE."""
    if not positive:
        raise TurboError("positive holds no prompt: connect a CLIP Text Encode node, or what WanImageToVideo gives.")
    network = model.model.diffusion_model
    room = network.patch_embedding.in_channels - model.get_model_object("latent_format").latent_channels
    for text, more in positive:
        check_text(text.shape[-1], network.text_dim)
        image = more.get("concat_latent_image")
        # some control models have room for two or three latents of 16 channels; the VAE of the 5B model makes 48
        if image is not None and (image.shape[1] % 16 or room < image.shape[1] == 48):
            check_channels("the start image in positive", image.shape[1], model)


def check_text(width, expected):
    """Raise TurboError unless text has the width that a model takes."""
    if width != expected:
        raise TurboError(
            f"positive comes from another text encoder: this model takes text of width {expected}, got {width}. "
            "Encode it with Wan's umT5 (Turbo Text Encoder Loader, CLIPLoader with type wan)."
        )


def check_experts(ours, theirs, high, low):
    """Raise TurboError when two models cannot be the high and the low expert of one family.

    ours, theirs: {name: value} of their sizes; high, low: names of their files, empty where there is none.
    """
    if ours != theirs:
        differ = ", ".join(f"{name} {ours[name]} / {theirs[name]}" for name in ours if ours[name] != theirs[name])
        raise TurboError(
            f"model ({high or 'high-noise'}) and model_low ({low or 'low-noise'}) are of different "
            f"families ({differ}): connect the two experts of the same Wan 2.2 A14B model."
        )
    if "low" in high.lower() and "high" not in high.lower() and "high" in low.lower():
        raise TurboError(f"the experts look swapped: model is {high}, model_low is {low}: exchange the two.")


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
