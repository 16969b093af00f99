"""Reads a clip back without a network, and scores how much of a caption came true.

Everything is fitted to what world.render could have drawn; whatever is far from all of it is read as "none".
"""

import math
from typing import NamedTuple

import torch

from . import world

NONE = "none"
_FAR_BACKGROUND, _FAR_COLOUR = 0.12, 0.25  # root mean square over the channels, of values 0 to 1
_POOR_SHAPE = 0.62  # overlap with the best shape, intersection over union of soft masks
_TOO_LARGE = 0.5  # share of the frame: no longer a shape
_FAR_MOTION = 0.09  # from the nearest path, as a share of the side
_SIZE_WEIGHT = 0.4  # of the logarithm of the size beside the place
_PHASES = 16
_SHAPE_FRAMES = 5  # looked at for the shape


class Reading(NamedTuple):
    """What a clip shows, each a name of world.ATTRIBUTES or "none", and how far the clip is from it."""

    colour: str
    shape: str
    motion: str
    background: str
    colour_distance: float
    shape_overlap: float
    motion_distance: float
    background_distance: float


def read(video: torch.Tensor) -> Reading:
    """Read a clip, float [3, T, H, W] in [-1, 1]; T >= 5."""
    video = (video.float().clamp(-1, 1) + 1) / 2
    background, background_distance = _background(video)
    behind = world.backdrop(torch.tensor([background]), video.shape[2])[0][:, None, :, None]
    apart = (video - behind).square().mean(0).sqrt()  # [T, H, W]
    colour, colour_distance = _colour(video, apart)
    front = torch.tensor(list(world.COLOURS.values()))[colour][:, None, None, None]
    toward = front - behind
    alpha = (((video - behind) * toward).sum(0) / toward.square().sum(0)).clamp(0, 1)
    alpha = torch.where(alpha < 0.25, 0.0, alpha)  # what a codec leaves behind on the background
    x, y, area = _moments(alpha)
    shape, overlap = _shape(alpha, x, y, area)
    motion, motion_distance = _motion(x, y, area, min(video.shape[2:]))
    names = [
        list(world.COLOURS)[colour] if colour_distance < _FAR_COLOUR else NONE,
        world.SHAPES[shape] if overlap > _POOR_SHAPE else NONE,
        world.MOTIONS[motion] if motion_distance < _FAR_MOTION else NONE,
        list(world.BACKGROUNDS)[background] if background_distance < _FAR_BACKGROUND else NONE,
    ]
    return Reading(*names, colour_distance, overlap, motion_distance, background_distance)


def score(video: torch.Tensor, scene) -> dict[str, bool]:
    """{"colour": True, ...} for what a clip shows of a scene, and "all" when nothing is missing."""
    seen = read(video)
    result = {name: getattr(seen, name) == wanted for name, wanted in world.describe(scene).items()}
    return result | {"all": all(result.values())}


def interval(right: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of a share."""
    if of == 0:
        return 0.0, 1.0
    share, spread = right / of, z * z / of
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / of + spread / (4 * of))
    return max(0.0, middle - half), min(1.0, middle + half)


def _background(video):
    """(index, distance) of the background nearest to the edges of the frames."""
    edges = torch.cat([video[:, :, :, :3], video[:, :, :, -3:]], -1).flatten(3)  # [3, T, H, 6]
    rows = edges.median(-1).values.median(1).values  # [3, H]
    shades = world.backdrop(torch.arange(len(world.BACKGROUNDS)), video.shape[2])
    distance = (shades - rows).square().mean((1, 2)).sqrt()
    best = int(distance.argmin())
    return best, float(distance[best])


def _colour(video, apart):
    """(index, distance) of the palette's colour nearest to the pixels that differ most from the background."""
    strongest = apart.flatten().kthvalue(int(apart.numel() * 0.985)).values
    inside = apart >= strongest.clamp_min(0.05)
    if not inside.any():
        return 0, math.inf
    mean = video[:, inside].median(1).values
    distance = (torch.tensor(list(world.COLOURS.values())) - mean).square().mean(1).sqrt()
    best = int(distance.argmin())
    return best, float(distance[best])


def _moments(alpha):
    """Centre and area of what is covered in each frame, in pixels: three [T]."""
    area = alpha.sum((1, 2)).clamp_min(1e-3)
    x = (alpha.sum(1) * (torch.arange(alpha.shape[2]) + 0.5)).sum(1) / area
    y = (alpha.sum(2) * (torch.arange(alpha.shape[1]) + 0.5)).sum(1) / area
    return x, y, area


def _shape(alpha, x, y, area):
    """(index, overlap) of the shape that covers best what is covered, drawn at the same place with the same area."""
    picks = torch.linspace(0, len(alpha) - 1, _SHAPE_FRAMES).round().long()
    alpha, x, y, area = alpha[picks], x[picks], y[picks], area[picks]
    shapes = torch.arange(len(world.SHAPES))
    radius = (area / torch.tensor(world.AREA)[:, None]).sqrt()
    size = (len(shapes), -1)
    drawn = world.coverage(shapes, x.expand(size), y.expand(size), radius, *alpha.shape[1:])
    overlap = torch.minimum(drawn, alpha).sum((2, 3)) / torch.maximum(drawn, alpha).sum((2, 3)).clamp_min(1e-6)
    overlap = overlap.median(1).values
    if area.median() > _TOO_LARGE * alpha[0].numel():
        overlap = torch.zeros_like(overlap)
    best = int(overlap.argmax())
    return best, float(overlap[best])


def _motion(x, y, area, side: int):
    """(index, distance) of the nearest path; where a clip begins and how large its shape is do not count."""
    count = len(world.MOTIONS)
    motion = torch.arange(count).repeat_interleave(_PHASES)
    phase = torch.arange(_PHASES).repeat(count) / _PHASES
    path = torch.stack(world.paths(motion, len(x), 1.0, phase), 1)  # [paths, 3, T]
    path[:, 2] = path[:, 2].log() * _SIZE_WEIGHT
    seen = torch.stack([x / side, y / side, area.log() / 2 * _SIZE_WEIGHT])
    difference = (path - path.mean(2, keepdim=True)) - (seen - seen.mean(1, keepdim=True))
    distance = difference.square().sum(1).mean(1).sqrt()
    best = int(distance.argmin())
    return best // _PHASES, float(distance[best])
