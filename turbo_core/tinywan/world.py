"""Clips with a truth: seeded short videos of one coloured shape that moves, and a long English caption for each.

A scene is a row of integers, one for each of ATTRIBUTES; what is left to chance (place, size, phase, words) comes
from a generator, so that a seed is a data set.
"""

import math
import random

import torch

WORLD = "tinywan"  # in the metadata of models that know nothing else, see checkpoint.WORLD
COLOURS = {
    "red": (0.90, 0.10, 0.10), "green": (0.10, 0.75, 0.15), "blue": (0.15, 0.30, 0.95), "yellow": (0.95, 0.85, 0.10),
    "magenta": (0.90, 0.15, 0.85), "cyan": (0.10, 0.85, 0.90), "orange": (1.00, 0.50, 0.05),
    "white": (0.95, 0.95, 0.95),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS = ("left", "right", "up", "down", "bounces", "orbits", "grows", "shrinks")
BACKGROUNDS = {
    "black": (0.02, 0.02, 0.02),
    "grey": (0.45, 0.45, 0.45),
    "navy": (0.05, 0.07, 0.30),
    "brown": (0.35, 0.20, 0.10),
}
ATTRIBUTES = {"colour": tuple(COLOURS), "shape": SHAPES, "motion": MOTIONS, "background": tuple(BACKGROUNDS)}
FRAMES, SIDE = 33, 192  # of the clips that the family is trained for
GRADIENT = 0.15  # a background is this much lighter at its top and darker at its foot
AREA = (math.pi, 3.2, 3.2, 2.72)  # of a shape of radius 1, in the order of SHAPES
_TRAVEL = 0.56  # path of a straight motion, as a share of the side

_COLOUR_WORDS = {name: (f"{name}", f"bright {name}", f"vivid {name}") for name in COLOURS}
_SHAPE_WORDS = {
    "circle": ("circle", "round disc", "circle with a clean edge"),
    "square": ("square", "square block", "square with sharp corners"),
    "triangle": ("triangle", "triangle pointing up", "three-cornered triangle"),
    "cross": ("cross", "plus-shaped cross", "cross with four equal arms"),
}
_MOTION_WORDS = {
    "left": ("moves to the left", "slides steadily left", "glides from right to left", "moving left"),
    "right": ("moves to the right", "slides steadily right", "glides from left to right", "moving right"),
    "up": ("moves up", "rises towards the top", "floats upwards", "moving up"),
    "down": ("moves down", "sinks towards the bottom", "falls slowly downwards", "moving down"),
    "bounces": ("bounces", "bounces up again and again", "keeps bouncing like a ball", "bouncing"),
    "orbits": ("orbits the middle", "circles around the middle", "travels around in an orbit", "orbiting the middle"),
    "grows": ("grows", "grows larger and larger", "swells and becomes bigger", "growing"),
    "shrinks": ("shrinks", "shrinks smaller and smaller", "dwindles and becomes tiny", "shrinking"),
}
_BACKGROUND_WORDS = {
    "black": ("on a black background", "in front of a black wall", "over a plain black backdrop"),
    "grey": ("on a grey background", "in front of a grey wall", "over a plain grey backdrop"),
    "navy": ("on a navy background", "in front of a navy wall", "over a plain navy backdrop"),
    "brown": ("on a brown background", "in front of a brown wall", "over a plain brown backdrop"),
}
# the words of those phrases that tell a shape or a motion from anything else
_SHAPE_NAMES = {"circle", "disc", "square", "block", "triangle", "cross"}
_MOTION_NAMES = {
    "left", "right", "up", "down", "top", "bottom", "upwards", "downwards", "bounces", "bouncing", "orbit", "orbits",
    "orbiting", "circles", "grows", "growing", "swells", "shrinks", "shrinking", "dwindles",
}  # fmt: skip
_OPENINGS = ("", "A short video. ", "In this clip, ", "Simple animation: ")
_ENDINGS = (
    "", " The camera does not move.", " The picture is clean, with soft even light.",
    " Flat shading, smooth motion, nothing else is in the scene.",
)  # fmt: skip


def is_held_out(scene) -> bool:
    """True for the sixteenth of all (colour, shape, motion) that no training clip shows."""
    colour, shape, motion = (int(value) for value in scene[:3])
    return (colour + 3 * shape + 5 * motion) % 16 == 0


def random_scenes(count: int, generator: torch.Generator, held_out: bool | None = False, motion=None) -> torch.Tensor:
    """int64 [count, 4], one column for each of ATTRIBUTES; held_out None mixes in the held-out combinations. motion:
    the name of the only one, default any."""
    rows = []
    while len(rows) < count:
        scene = [int(torch.randint(len(values), (), generator=generator)) for values in ATTRIBUTES.values()]
        scene[2] = scene[2] if motion is None else MOTIONS.index(motion)
        if held_out is None or is_held_out(scene) == held_out:
            rows.append(scene)
    return torch.tensor(rows)


def describe(scene) -> dict[str, str]:
    """{"colour": "red", ...} of a scene."""
    return {name: values[int(index)] for (name, values), index in zip(ATTRIBUTES.items(), scene)}


def caption(scene, seed: int) -> str:
    """A long English caption of a scene; the seed picks among wordings."""
    words, choose = describe(scene), random.Random(seed).choice
    colour, shape = choose(_COLOUR_WORDS[words["colour"]]), choose(_SHAPE_WORDS[words["shape"]])
    motion, place = choose(_MOTION_WORDS[words["motion"]]), choose(_BACKGROUND_WORDS[words["background"]])
    opening = choose(_OPENINGS)
    article = ("A" if not opening or opening.endswith((". ", ": ")) else "a") + ("n" if colour[0] in "aeiou" else "")
    return f"{opening}{article} {colour} {shape} {motion} {place}.{choose(_ENDINGS)}"


def vocabulary() -> set[str]:
    """Every word of every caption, in small letters."""
    tables = (_COLOUR_WORDS, _SHAPE_WORDS, _MOTION_WORDS, _BACKGROUND_WORDS)
    phrases = [phrase for table in tables for words in table.values() for phrase in words]
    return words_of(" ".join([*phrases, *_OPENINGS, *_ENDINGS, "a an"]))


def words_of(text: str) -> set[str]:
    return set("".join(c if c.isalnum() or c == "-" else " " for c in text.lower()).split())


def is_outside(prompt: str) -> bool:
    """True when a prompt names no colour, shape, motion and background that TinyWan was shown."""
    words = words_of(prompt)
    return not all(words & named for named in (set(COLOURS), _SHAPE_NAMES, _MOTION_NAMES, set(BACKGROUNDS)))


def told(prompt: str) -> str | None:
    """What to say of a prompt that is outside, None for any other: TinyWan renders something all the same."""
    if not is_outside(prompt):
        return None
    return (
        "TinyWan knows only its small world, and this prompt is not of it. Name a colour "
        f"({', '.join(COLOURS)}), a shape ({', '.join(SHAPES)}), a motion (moves left, right, up or down, bounces, "
        f"orbits, grows, shrinks) and a background ({', '.join(BACKGROUNDS)})."
    )


def told_of_size(width: int, height: int, frames: int) -> str | None:
    """What to say of a video that is far larger or longer than those that the family is trained for, else None."""
    if width * height <= 2 * SIDE**2 and frames <= 2 * FRAMES:
        return None
    return (
        f"TinyWan learnt from videos of {SIDE}x{SIDE} with {FRAMES} frames, and shows little in one of "
        f"{width}x{height} with {frames}. Give --size {SIDE}x{SIDE} --frames {FRAMES}."
    )


def paths(motion: torch.Tensor, frames: int, travel=1.0, phase=0.0):
    """Where a shape is and how large: x, y (shares of the side, 0 is the middle, y down) and size, each [B, frames].

    motion: int64 [B] indices of MOTIONS. travel: factor of the straight paths; phase: of the orbit, in turns; [B] or
    numbers.
    """
    u = torch.linspace(0, 1, frames)[None].expand(len(motion), -1)
    travel, phase = (
        torch.as_tensor(value, dtype=torch.float32).expand(len(motion))[:, None] for value in (travel, phase)
    )
    zero, straight = torch.zeros_like(u), _TRAVEL * travel * (u - 0.5)
    bounce = 0.2 - 0.4 * travel * (2 * math.pi * u).sin().abs()
    turn = 2 * math.pi * (u + phase)
    x = torch.stack([-straight, straight, zero, zero, zero, 0.22 * travel * turn.cos(), zero, zero])
    y = torch.stack([zero, zero, -straight, straight, bounce, 0.22 * travel * turn.sin(), zero, zero])
    one = torch.ones_like(u)
    size = torch.stack([one] * 6 + [0.6 + 0.9 * u, 1.5 - 0.9 * u])
    row = torch.arange(len(motion))
    return x[motion, row], y[motion, row], size[motion, row]


def coverage(shape: torch.Tensor, x, y, radius, height: int, width: int) -> torch.Tensor:
    """How much of each pixel a shape covers, 0 to 1 with soft edges: float [B, T, height, width].

    shape: int64 [B]; x, y, radius: [B, T] in pixels.
    """
    dx = torch.arange(width) + 0.5 - x[..., None, None]  # [B, T, 1, W]
    dy = torch.arange(height)[:, None] + 0.5 - y[..., None, None]  # [B, T, H, 1]
    r = radius[..., None, None]
    out = torch.empty(*x.shape, height, width)
    for index in range(len(SHAPES)):
        rows = shape == index
        if rows.any():
            out[rows] = (0.5 - _distance(index, dx[rows], dy[rows], r[rows])).clamp(0, 1)
    return out


def _distance(index: int, dx, dy, r):
    """Signed distance in pixels to the edge of a shape, negative inside."""
    if index == 0:
        return (dx.square() + dy.square()).sqrt() - r
    if index == 1:
        return torch.maximum(dx.abs(), dy.abs()) - 0.8944 * r
    if index == 2:  # equilateral, its centroid in the middle: inner radius 0.785, outer twice that
        slope = dx.abs() * math.sqrt(0.75) - dy * 0.5
        return torch.maximum(slope, dy.expand_as(slope)) - 0.785 * r
    long, short = 1.2 * r, 0.4 * r
    flat = torch.maximum(dx.abs() - long, dy.abs() - short)
    return torch.minimum(flat, torch.maximum(dx.abs() - short, dy.abs() - long))


def backdrop(background: torch.Tensor, height: int) -> torch.Tensor:
    """Rows of colour of a background, float [B, 3, height], 0 to 1."""
    shade = 1 + GRADIENT * (1 - 2 * torch.linspace(0, 1, height))
    return torch.tensor(list(BACKGROUNDS.values()))[background][:, :, None] * shade


def render(scenes: torch.Tensor, frames: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Clips of scenes [B, 4]: float32 [B, 3, frames, height, width] in [-1, 1]."""
    colour, shape, motion, background = scenes.unbind(1)
    count, side = len(scenes), min(height, width)

    def between(low, high):
        return low + (high - low) * torch.rand(count, generator=generator)

    x, y, size = paths(motion, frames, between(0.9, 1.1), between(0, 1))
    x = width / 2 + side * (x + between(-0.08, 0.08)[:, None])
    y = height / 2 + side * (y + between(-0.08, 0.08)[:, None])
    radius = side * between(0.13, 0.17)[:, None] * size
    alpha = coverage(shape, x, y, radius, height, width)[:, None]
    behind = backdrop(background, height)[:, :, None, :, None]
    front = torch.tensor(list(COLOURS.values()))[colour][:, :, None, None, None]
    return (behind + alpha * (front - behind)) * 2 - 1
