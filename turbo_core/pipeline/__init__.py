"""Prompt, and image, to video without ComfyUI: text encoder, VAE, few-step sampling with one or two experts."""

from .clip import Clip, Result
from .resident import Pipeline
from .sampling import Trajectory, encode_image, sample

__all__ = ["Clip", "Pipeline", "Result", "Trajectory", "encode_image", "generate", "sample"]


def generate(
    prompt: str, dit, vae, text_encoder, *, dit_low=None, tokenizer=None, vae_fast=None, device=None, dtype=None,
    progress=None, **settings,
) -> Result:  # fmt: skip
    """Make one video, and keep nothing: only one of the large networks is in memory at a time, the text encoder is gone
    before the DiT is read, the high-noise expert before the low-noise one.

    Arguments as of Pipeline; settings: the fields of Clip. Each file is opened once; the diffusion models and the
    settings are checked before anything computes. Raises TurboError for anything that does not fit together.
    """
    files = {"dit_low": dit_low, "tokenizer": tokenizer, "vae_fast": vae_fast}
    place = {"device": device, "dtype": dtype, "progress": progress}
    with Pipeline(dit, vae, text_encoder, memory=0, **files, **place) as pipeline:
        return pipeline(prompt, **settings)
