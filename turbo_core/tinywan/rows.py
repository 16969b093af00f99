"""The rows of the quality report: which file each is about, how it is loaded and how it is sampled."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from .. import checkpoint, pipeline
from ..pipeline.text import encode_text, load_text_encoder
from ..schedule import default_sigma_max, rcm_sigmas
from ..train import models, precision, teacher
from ..train.experts import BOUNDARY
from ..wan import Text, WanModel
from . import FILES, PAIR, data, world


class Row(NamedTuple):
    """One line of the report. file: a key of FILES, or "pair". guidance None: the few-step sampler without guidance;
    topk None: dense. base: the row that this one accelerates."""

    name: str
    file: str
    steps: int
    base: str | None = None
    guidance: float | None = None
    topk: float | None = None
    precision: str = "bf16"
    format: str | None = None


SHIFT = 5.0  # of the times at which the teacher is sampled
TEACHER, STUDENT, IMAGE = "teacher, 50 steps, guidance 3", "rCM, 4 steps", "I2V, 4 steps, SLA top-k 0.15"
ROWS = (
    Row(TEACHER, "teacher", 50, guidance=teacher.GUIDANCE),
    Row("teacher, 4 steps, guidance 3", "teacher", 4, guidance=teacher.GUIDANCE),
    Row(STUDENT, "student", 4, TEACHER),
    Row("rCM, 3 steps", "student", 3, TEACHER),
    Row("rCM, 2 steps", "student", 2, TEACHER),
    Row("rCM, 1 step", "student", 1, TEACHER),
    Row("rCM 4 + SLA top-k 1.0", "turbo", 4, STUDENT, topk=1.0),
    Row("rCM 4 + SLA top-k 0.3", "turbo", 4, STUDENT, topk=0.3),
    Row("rCM 4 + SLA top-k 0.15", "turbo", 4, STUDENT, topk=0.15),  # three of 21 key blocks
    Row("rCM 4 + SLA top-k 0.1", "turbo", 4, STUDENT, topk=0.1),  # two
    Row("rCM 4 + SageSLA top-k 0.15", "turbo", 4, STUDENT, topk=0.15, precision="int8"),
    Row("rCM 4 + W8A8 block", "student", 4, STUDENT, format="int8_block"),
    Row("rCM 4 + W8A8 row", "student", 4, STUDENT, format="int8_row"),
    Row("rCM 4 + SageSLA 0.15 + W8A8 block", "turbo", 4, STUDENT, topk=0.15, precision="int8", format="int8_block"),
    Row(IMAGE, "pair", 4, topk=0.15),
    Row("I2V, same + SageSLA + W8A8 block", "pair", 4, IMAGE, topk=0.15, precision="int8", format="int8_block"),
)


def files_of(row: Row) -> list[str]:
    """Names of the transformers of a row."""
    return list(PAIR.values()) if row.file == "pair" else [FILES[row.file]]


def pictures(codec, scenes, seed: int):
    """(first frames [B, 3, H, W] of clips of the scenes, what an image-to-video model is given of them)."""
    video = world.render(scenes, world.FRAMES, world.SIDE, world.SIDE, torch.Generator().manual_seed(seed))
    return video[:, :, 0], data.images_of(codec, video).float()


def prompts(folder, count: int, seed: int = 1000):
    """(scenes, captions, context [count, 512, text_dim], context of the empty prompt) of a report; fewer are the first
    ones of more."""
    scenes = world.random_scenes(count, torch.Generator().manual_seed(seed), held_out=None)
    captions = [world.caption(scene, seed + i) for i, scene in enumerate(scenes)]
    encoder, tokenize = load_text_encoder(Path(folder) / FILES["text"], dtype=torch.float32)
    context = torch.cat([encode_text(encoder, tokenize, captions[i : i + 32]) for i in range(0, count, 32)])
    return scenes, captions, context.clone(), encode_text(encoder, tokenize, [""]).clone()


def sample_row(model_at, row: Row, context, empty, seed: int, y=None) -> torch.Tensor:
    """Latents of a batch of prompts, context [B, 512, text_dim]; model_at: see load_row; y: see pictures.

    A teacher runs as it was trained, in bfloat16 where the CPU has it, and the students in float32, in which int8 is
    told from rounding.
    """
    shape = (len(context), 16, (world.FRAMES - 1) // 4 + 1, world.SIDE // 8, world.SIDE // 8)
    if row.guidance is None:
        sigmas = rcm_sigmas(row.steps, default_sigma_max(16 if y is None else 36))
        attention = {"topk": row.topk, "precision": row.precision}
        return pipeline.sample(model_at, context, shape, sigmas, y=y, seed=seed, **attention)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    both = Text(torch.cat([context, empty.expand_as(context)]))  # as the student's sampler has it
    with precision.autocast("cpu"):
        return teacher.sample(model_at, x, both, row.steps, row.guidance, SHIFT)


def load_row(folder: Path, row: Row):
    """(callable (sigma) -> the model of a row at it, the size of its files in bytes), quantized where the row says
    so."""
    if row.file != "pair":
        model, size = _load(folder / FILES[row.file], row.format)
        if row.guidance is not None:
            models.keep_scores(model)  # as it was trained
        return lambda sigma: model, size
    (high, size), (low, more) = (_load(folder / name, row.format) for name in files_of(row))
    return lambda sigma: high if sigma >= BOUNDARY else low, size + more


def _load(path: Path, format: str | None) -> tuple[WanModel, int]:
    with tempfile.TemporaryDirectory() as aside:
        if format is not None:
            path = Path(checkpoint.quantize(path, Path(aside) / "quantized.safetensors", format).path)
        state, described = checkpoint.load(path, mapped=False)  # the file goes
        return WanModel.from_state_dict(state, torch.float32, num_heads=described.num_heads), path.stat().st_size
