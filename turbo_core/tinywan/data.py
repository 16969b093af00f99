"""TinyWan's training data: clips of its world through the VAE, captions beside them."""

import torch
import torch.nn.functional as F

from ..train.data import Data, encode_captions
from ..vae import encode_video
from . import world


def joined(parts: list[Data]) -> Data:
    """One data set of several, all with the empty caption in row 0."""
    longest = max(part.text.shape[1] for part in parts)
    starts = torch.tensor([0, *(len(part.text) for part in parts[:-1])]).cumsum(0)
    return Data(
        torch.cat([part.latents for part in parts]),
        torch.cat([F.pad(part.text, (0, 0, 0, longest - part.text.shape[1])) for part in parts]),
        torch.cat([part.lengths for part in parts]),
        torch.cat([part.captions_of + start for part, start in zip(parts, starts)]),
        None if parts[0].images is None else torch.cat([part.images for part in parts]),
    )


def images_of(vae, video: torch.Tensor) -> torch.Tensor:
    """What an image-to-video model is given of clips [B, 3, T, H, W]: [B, 20, T', H/8, W/8] as pipeline.encode_image
    makes it."""
    first = torch.zeros_like(video)
    first[:, :, 0] = video[:, :, 0]
    latents = encode_video(vae, first)
    mask = torch.zeros_like(latents[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, latents], 1)


def make_clips(
    vae, encoder, tokenize, count: int, frames=None, side=None, wordings=4, images=False, motion=None, seed=0
) -> Data:
    """The data set of TinyWan: rendered clips without the held-out combinations, with several captions each.

    frames, side: default the world's; images: with what an image-to-video model is given of them; motion: the name of
    the only one, default any.
    """
    frames, side = frames or world.FRAMES, side or world.SIDE
    random = torch.Generator().manual_seed(seed)
    scenes = world.random_scenes(count, random, motion=motion)
    latents, given = [], []
    for some in scenes.split(4):
        video = world.render(some, frames, side, side, random)
        latents.append(encode_video(vae, video).to(torch.bfloat16))
        if images:
            given.append(images_of(vae, video).to(torch.bfloat16))
    words = [
        world.caption(scene, seed * count + i * wordings + w) for i, scene in enumerate(scenes) for w in range(wordings)
    ]
    text, lengths = encode_captions(encoder, tokenize, ["", *words])
    captions_of = 1 + torch.arange(count * wordings).view(count, wordings)
    return Data(torch.cat(latents), text, lengths, captions_of, torch.cat(given) if images else None)
