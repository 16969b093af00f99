"""One video that is wanted, on its way, and what came of it."""

import math
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch

from ..checkpoint import Description
from ..errors import TurboError, shown
from ..lora import Lora, as_loras
from ..schedule import default_sigma_max, rcm_sigmas
from ..vae import LATENT_CHANNELS
from ..wan import PATCH
from . import sizes
from .inputs import check_sampling, check_task
from .video import read_image


@dataclass(frozen=True)
class Clip:
    """What a person asks for.

    image: path of the first frame. size: (width, height), multiples of 16; adaptive keeps its area and takes the
    image's aspect ratio. frames: 4n + 1. steps: 1 to 4, at most 100. sigma_max: default 80 (T2V) or 200 (I2V). topk:
    fraction of key blocks for sparse-linear attention, None for dense attention, "auto" for 0.1 where the checkpoint
    was trained so and dense elsewhere. precision: of sparse attention, "bf16" or "int8". boundary: sigma from which
    on the low-noise expert works. noise_device: where noise is drawn; "cpu" gives the same video on every machine,
    "cuda" the noise of the reference. tiled: decode in tiles. lora: files of LoRAs with their strengths,
    "style.safetensors:0.8" or (path, 0.8), of the only or the high-noise model; lora_low: those of the
    low-noise expert.
    """

    prompt: str
    seed: int = 0
    image: object = None
    size: tuple[int, int] = (832, 480)
    adaptive: bool = False
    frames: int = 81
    steps: int = 4
    sigma_max: float | None = None
    topk: float | str | None = "auto"
    precision: str = "bf16"
    ode: bool = False
    boundary: float = 0.9
    noise_device: str = "cpu"
    tiled: bool = False
    lora: tuple[Lora, ...] = ()
    lora_low: tuple[Lora, ...] = ()

    def __post_init__(self):
        for name in ("lora", "lora_low"):
            object.__setattr__(self, name, as_loras(getattr(self, name)))

    @property
    def loras(self) -> tuple[tuple[Lora, ...], tuple[Lora, ...]]:
        """Of both models."""
        return self.lora, self.lora_low

    def plain(self) -> dict:
        """The fields as JSON takes them."""
        loras = {name: [[str(file), by] for file, by in getattr(self, name)] for name in ("lora", "lora_low")}
        return asdict(self) | loras | {"image": None if self.image is None else str(self.image)}

    @classmethod
    def of_plain(cls, fields: dict) -> "Clip":
        """The clip of which `plain` gave these fields."""
        return cls(**fields | {"size": tuple(fields["size"])})


class Ready(NamedTuple):
    """A clip that is known to fit a model, and what follows from the two."""

    clip: Clip
    sigmas: torch.Tensor  # [steps + 1], the last one 0
    topk: float | None
    shape: tuple[int, ...]  # of the latents, [1, 16, T, H, W]
    size: tuple[int, int]
    picture: torch.Tensor | None  # uint8 [3, H, W], as in the file
    high_steps: int  # of the first expert; with a single model all

    @property
    def tokens(self) -> int:
        return math.prod(self.shape[2:]) // math.prod(PATCH)


@dataclass
class Result:
    """A finished video and how it came about; times in seconds, memory in bytes."""

    frames: torch.Tensor | None  # uint8 [T, H, W, 3]; None in all processes of a team but the first
    latents: torch.Tensor  # float32 [1, 16, (T-1)/4+1, H/8, W/8], normalized
    settings: dict
    seconds: dict[str, float] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    peak_memory: dict[str, int] = field(default_factory=dict)


class Work:
    """A clip on its way through the pipeline."""

    def __init__(self, clip: Clip, progress):
        self.clip, self.progress = clip, progress
        self.ready = self.embedding = self.trajectory = self.latents = None
        self.failed = False
        self.seconds, self.step_seconds = {}, []

    def let_go(self):
        """Forget all: a list of clips outlives each of them. What was measured is the result's."""
        self.ready = self.embedding = self.trajectory = self.latents = None
        self.seconds, self.step_seconds = {}, []

    @contextmanager
    def stage(self, name: str, total: int = 1, begins: bool = True, ends: bool = True):
        """Times a stage, summed when it comes in parts, and reports its start and end; as what is between: a callable
        (done, total)."""
        if begins:
            self.progress(name, 0, total)
        start = time.perf_counter()
        yield lambda done, total: self.progress(name, done, total)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        if ends:
            self.progress(name, total, total)


def check_prompt(prompt: str) -> None:
    """Raise TurboError for a prompt that is no text."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise TurboError("The prompt is not valid text: is the terminal set to UTF-8?") from error


def _check_noise_device(device) -> None:
    try:
        torch.Generator(device)
    except RuntimeError as error:
        reason = shown(str(error).splitlines()[0], 120)
        raise TurboError(
            f"Noise cannot be drawn on device {shown(device)} ({reason}). Use --noise-device cpu."
        ) from error


def check_clip(clip: Clip, model: Description, has_low: bool) -> Ready:
    """Everything of a clip held to the model before anything computes. Raises TurboError, which names the cure."""
    check_prompt(clip.prompt)
    if not 0 <= clip.seed < 1 << 64:
        raise TurboError(f"seed is a number from 0 to 2^64 - 1, got {clip.seed}.")
    _check_noise_device(clip.noise_device)
    check_task(model, clip.image)
    if clip.lora_low and not has_low:
        raise TurboError(f"--lora-low is for the low-noise expert of a pair, {model.path} is one model: use --lora.")
    sigmas = rcm_sigmas(clip.steps, default_sigma_max(model.in_dim) if clip.sigma_max is None else clip.sigma_max)
    topk = check_sampling(model, has_low, sigmas, clip.boundary, clip.topk, clip.precision)
    picture = None if clip.image is None else read_image(clip.image)
    width, height = clip.size
    if clip.adaptive and picture is not None:
        width, height = sizes.adaptive_size(picture.shape[2], picture.shape[1], width, height)
    shape = (1, LATENT_CHANNELS, *sizes.latent_shape(width, height, clip.frames))
    high = sum(sigma >= clip.boundary for sigma in sigmas[:-1].tolist()) if has_low else clip.steps
    return Ready(clip, sigmas, topk, shape, (width, height), picture, high)


def settings_of(ready: Ready, model: Description, has_low: bool) -> dict:
    """What a video is made by, as it is kept with it; what the machine adds is the pipeline's."""
    clip = ready.clip
    return {
        "prompt": clip.prompt, "model": model.family, "size": "{}x{}".format(*ready.size), "frames": clip.frames,
        "steps": clip.steps, "sigmas": [round(sigma, 6) for sigma in ready.sigmas.tolist()],
        "rule": "ode" if clip.ode else "sde", "seed": clip.seed, "topk": ready.topk, "precision": clip.precision,
        "boundary": clip.boundary if has_low else None, "weights": model.format,
    }  # fmt: skip


def raised(clip: Clip, error: Exception) -> None:
    """What becomes of a clip that fails where nobody asked to be told."""
    raise error


def raised_if_told(failed):
    """The same for errors that a person can mend, `failed` for those that nobody foresaw."""
    return lambda clip, error: (raised if isinstance(error, TurboError) else failed)(clip, error)
