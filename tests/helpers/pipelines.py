"""Pipelines of the small family on a CPU, and clips for them."""

import torch

from turbo_core import pipeline
from turbo_core.pipeline import Clip, Pipeline

SMALL = {"size": (32, 32), "frames": 5}
ALL = 1 << 40


def t2v(tiny, **settings):
    return Pipeline(
        tiny / "TinyWan2.1-T2V.pth",
        tiny / "TinyWan2.1_VAE.pth",
        tiny / "tiny_umt5.safetensors",
        device="cpu",
        **settings,
    )


def i2v(tiny, **settings):
    pair = (tiny / f"TinyWan2.2-I2V-{name}-quant.pth" for name in ("high", "low"))
    others = tiny / "TinyWan2.1_VAE.pth", tiny / "tiny_umt5.safetensors"
    return Pipeline(next(pair), *others, dit_low=next(pair), device="cpu", **settings)


def alone(pipe_files, clip):
    """The clip by generate, from files of a pipeline."""
    settings = {name: value for name, value in vars(clip).items() if name != "prompt"}
    with pipe_files as pipe:
        paths = [pipe.paths[name] for name in ("dit", "vae", "text encoder")]
        low = pipe.experts.descriptions[1].path if pipe.has_low else None
    return pipeline.generate(clip.prompt, *paths, dit_low=low, device="cpu", **settings)


def same(one, other):
    return torch.equal(one.latents, other.latents) and torch.equal(one.frames, other.frames)


CLIPS = [
    Clip("a red circle", seed=3, steps=2, **SMALL),
    Clip("a blue square that moves far to the left", seed=4, steps=4, ode=True, **SMALL),
    Clip("a red circle", seed=5, steps=1, topk=None, size=(48, 32), frames=9),
]
