"""The quality report: how much of a prompt comes true at each acceleration, read by the judge."""

import hashlib
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from .. import checkpoint, pipeline
from ..errors import TurboError
from ..schedule import default_sigma_max, rcm_sigmas
from ..text import encode_text, load_text_encoder
from ..tinywan import FILES, PAIR
from ..video import complete_or_nothing
from ..wan import WanModel
from . import clips, data, judge, vae
from .experts import BOUNDARY
from .teacher import GUIDANCE, SHIFT

FRAMES, SIDE, BATCH = 33, 128, 8


class Row(NamedTuple):
    """One line of the report. file: a key of FILES, or "pair". guidance None: the few-step sampler without guidance;
    topk None: dense."""

    name: str
    file: str
    steps: int
    guidance: float | None = None
    topk: float | None = None
    precision: str = "bf16"
    format: str | None = None


ROWS = (
    Row("teacher, 50 steps, guidance 3", "teacher", 50, GUIDANCE),
    Row("teacher, 4 steps, guidance 3", "teacher", 4, GUIDANCE),
    Row("rCM, 4 steps", "student", 4),
    Row("rCM, 3 steps", "student", 3),
    Row("rCM, 2 steps", "student", 2),
    Row("rCM, 1 step", "student", 1),
    Row("rCM 4 + SLA top-k 1.0", "turbo", 4, topk=1.0),
    Row("rCM 4 + SLA top-k 0.3", "turbo", 4, topk=0.3),
    Row("rCM 4 + SLA top-k 0.15", "turbo", 4, topk=0.15),  # one of nine key blocks, as top-k 0.1 would be
    Row("rCM 4 + SageSLA top-k 0.15", "turbo", 4, topk=0.15, precision="int8"),
    Row("rCM 4 + W8A8 block", "student", 4, format="int8_block"),
    Row("rCM 4 + W8A8 row", "student", 4, format="int8_row"),
    Row("rCM 4 + SageSLA 0.15 + W8A8 block", "turbo", 4, topk=0.15, precision="int8", format="int8_block"),
    Row("I2V, 4 steps, SLA top-k 0.15", "pair", 4, topk=0.15),
    Row("I2V, same + SageSLA + W8A8 block", "pair", 4, topk=0.15, precision="int8", format="int8_block"),
)


def evaluate(folder, out, count=160, seed=1000, rows=ROWS, log=print) -> list[dict]:
    """Measure the family in a folder and return the report, a dictionary a row; out/quality.json keeps each finished
    row, and a second call measures only what is missing there.

    count: prompts, the same ones, with the same noise, for every row; a sixteenth are combinations that training
    never saw. The rows of the image-to-video pair are left out where the folder has none. Raises TurboError when a
    file is missing, and when out holds a report of other files or prompts.
    """
    folder, out = Path(folder), Path(out)
    missing = [name for name in FILES.values() if not (folder / name).is_file()]
    if missing:
        raise TurboError(f"{folder} lacks {missing[0]}: train it with turbo-core train tiny, or name another folder.")
    out.mkdir(parents=True, exist_ok=True)
    report = read(out / "quality.json")
    of = _digest(folder, FILES.values(), count, seed)
    pair = all((folder / name).is_file() for name in PAIR.values())
    of_pair = _digest(folder, [*FILES.values(), *PAIR.values()], count, seed) if pair else None
    if any(row.get("of") != (of_pair if row.get("pair") else of) for row in report):
        raise TurboError(
            f"{out / 'quality.json'} is a report of other files or prompts. Choose another folder, or remove it."
        )
    scenes, _, context, empty = prompts(folder, count, seed)
    decoder = vae.load(folder / FILES["vae"])
    if not any(row["name"] == "VAE" for row in report):
        report.append(_vae_row(decoder, scenes[:32], folder / FILES["vae"]) | {"of": of})
        _keep(report, out)
    for row in rows:
        if any(done["name"] == row.name for done in report) or (row.file == "pair" and not pair):
            continue
        model_at, size = load_row(folder, row)
        seconds, marks, apart = 0.0, [], []
        for start in range(0, count, BATCH):
            part = slice(start, start + BATCH)
            first, y = pictures(decoder, scenes[part], seed + start) if row.file == "pair" else (None, None)
            began = time.perf_counter()
            latents = sample_row(model_at, row, context[part].clone(), empty, seed + start, y)
            seconds += time.perf_counter() - began
            videos = data.decode_latents(decoder, latents)
            if first is not None:
                apart += (videos[:, :, 0].clamp(-1, 1) - first).square().mean((1, 2, 3)).tolist()
            marks += [judge.score(video, scene) for video, scene in zip(videos, scenes[part])]
            log(f"{row.name}: {len(marks)}/{count}, {sum(mark['all'] for mark in marks)} all right")
        line = _summary(row, marks, scenes, seconds / count, size)
        if apart:
            line |= {"pair": True, "first_frame": round(_psnr(apart), 2)}
        report.append(line | {"of": of_pair if apart else of})
        _keep(report, out)
    return report


def pictures(codec, scenes, seed: int):
    """(first frames [B, 3, H, W] of clips of the scenes, what an image-to-video model is given of them)."""
    video = clips.render(scenes, FRAMES, SIDE, SIDE, torch.Generator().manual_seed(seed))
    return video[:, :, 0], data.images_of(codec, video).float()


def prompts(folder, count: int, seed: int = 1000):
    """(scenes, captions, context [count, 512, text_dim], context of the empty prompt) of a report; fewer are the first
    ones of more."""
    scenes = clips.random_scenes(count, torch.Generator().manual_seed(seed), held_out=None)
    captions = [clips.caption(scene, seed + i) for i, scene in enumerate(scenes)]
    encoder, tokenize = load_text_encoder(Path(folder) / FILES["text"], dtype=torch.float32)
    context = torch.cat([encode_text(encoder, tokenize, captions[i : i + 32]) for i in range(0, count, 32)])
    return scenes, captions, context.clone(), encode_text(encoder, tokenize, [""]).clone()


def sample_row(model_at, row: Row, context, empty, seed: int, y=None) -> torch.Tensor:
    """Latents of a batch of prompts, context [B, 512, text_dim]; model_at: see load_row; y: see pictures."""
    shape = (len(context), 16, (FRAMES - 1) // 4 + 1, SIDE // 8, SIDE // 8)
    if row.guidance is None:
        sigmas = rcm_sigmas(row.steps, default_sigma_max(16 if y is None else 36))
        attention = {"topk": row.topk, "precision": row.precision}
        return pipeline.sample(model_at, context, shape, sigmas, y=y, seed=seed, **attention)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    both = torch.cat([context, empty.expand_as(context)])
    times = torch.linspace(1, 0, row.steps + 1)
    times = (SHIFT * times / (1 + (SHIFT - 1) * times)).tolist()
    with torch.inference_mode():
        for now, after in itertools.pairwise(times):
            at = torch.full((2 * len(x),), 1000 * now)
            wanted, unwanted = model_at(now)(torch.cat([x, x]), at, both).chunk(2)
            x = x + (after - now) * (unwanted + row.guidance * (wanted - unwanted))
    return x


def load_row(folder: Path, row: Row):
    """(callable (sigma) -> the model of a row at it, the size of its files in bytes), quantized where the row says
    so."""
    if row.file != "pair":
        model, size = _load(folder / FILES[row.file], row.format)
        return lambda sigma: model, size
    (high, size), (low, more) = (_load(folder / name, row.format) for name in PAIR.values())
    return lambda sigma: high if sigma >= BOUNDARY else low, size + more


def _load(path: Path, format: str | None) -> tuple[WanModel, int]:
    with tempfile.TemporaryDirectory() as aside:
        if format is not None:
            path = Path(checkpoint.quantize(path, Path(aside) / "quantized.safetensors", format).path)
        state, described = checkpoint.load(path)
        state = {name: tensor.clone() for name, tensor in state.items()}  # the file goes
        return WanModel.from_state_dict(state, torch.float32, num_heads=described.num_heads), path.stat().st_size


def read(path: Path) -> list[dict]:
    """A report as evaluate left it; an empty one when there is none."""
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TurboError(f"{path} is not a report ({error}). Remove it and evaluate again.") from error


def _vae_row(decoder, scenes, path: Path) -> dict:
    """PSNR of clips that went through the VAE, and what the judge reads in them: the most that any model can reach."""
    random = torch.Generator().manual_seed(7)
    error, marks = [], []
    for some in scenes.split(4):
        video = clips.render(some, FRAMES, SIDE, SIDE, random)
        shown = data.decode_latents(decoder, data.encode_latents(decoder, video)).clamp(-1, 1)
        error += (shown - video).square().mean((1, 2, 3, 4)).tolist()
        marks += [judge.score(clip, scene) for clip, scene in zip(shown, some)]
    return _scores("VAE", marks) | {"psnr": round(_psnr(error), 2), "bytes": path.stat().st_size}


def _psnr(errors: list[float]) -> float:
    """Mean dB of mean square errors of pictures in [-1, 1]."""
    return 10 * torch.log10(4 / torch.tensor(errors)).mean().item()


def _scores(name: str, marks: list[dict]) -> dict:
    shares = {key: round(sum(mark[key] for mark in marks) / len(marks), 4) for key in marks[0]}
    low, high = judge.interval(sum(mark["all"] for mark in marks), len(marks))
    return {"name": name, "count": len(marks), **shares, "low": round(low, 4), "high": round(high, 4)}


def _summary(row: Row, marks, scenes, seconds: float, size: int) -> dict:
    held = [mark["all"] for mark, scene in zip(marks, scenes) if clips.is_held_out(scene)]
    motions = {}
    for mark, scene in zip(marks, scenes):
        right = motions.setdefault(clips.describe(scene)["motion"], [0, 0])
        right[0] += mark["motion"]
        right[1] += 1
    extra = {"held_out": sum(held), "held_out_count": len(held), "seconds": round(seconds, 3), "bytes": size}
    extra["motions"] = motions  # {motion: [read back, asked for]}
    return _scores(row.name, marks) | {"steps": row.steps} | extra


def _digest(folder: Path, files, count: int, seed: int) -> str:
    """Tells apart what reports are about: the files of the family and the prompts."""
    digest = hashlib.sha256(f"{count} {seed}".encode())
    for name in files:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]


def _keep(report: list[dict], out: Path) -> None:
    try:
        with complete_or_nothing(out / "quality.json") as part:
            part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise TurboError(f"Could not write {out / 'quality.json'} ({error}). Free space and start again.") from error
