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
from . import clips, data, engine, judge, vae
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


def evaluate(folder, out, count=160, seed=1000, rows=ROWS, again=False, log=print) -> list[dict]:
    """Measure the family in a folder and return the report, a dictionary a row; out/quality.json keeps each finished
    row, and a second call measures only what is missing there.

    count: prompts, the same ones, with the same noise, for every row; a sixteenth are combinations that training
    never saw. The processes of torchrun share them. The rows of the image-to-video pair are left out where the folder
    has none. again: rows of other files than those in the folder are measured again. Raises TurboError when a file is
    missing, and, without again, when out holds a report of other files or prompts.
    """
    folder, out = Path(folder), Path(out)
    missing = [name for name in FILES.values() if not (folder / name).is_file()]
    if missing:
        raise TurboError(f"{folder} lacks {missing[0]}: train it with turbo-core train tiny, or name another folder.")
    if count < 1:
        raise TurboError(f"A report needs at least one prompt, got {count}.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TurboError(f"{out} cannot be a folder for a report ({error}). Choose another one.") from error
    if not all((folder / name).is_file() for name in PAIR.values()):
        rows = [row for row in rows if row.file != "pair"]
    needs = {"VAE": [FILES["vae"]]} | {row.name: [FILES["vae"], FILES["text"], *_files(row)] for row in rows}
    asked = {"count": count, "seed": seed}
    of = {name: asked | {"files": _digest(folder, files)} for name, files in needs.items()}
    # the first process's, in all of them
    report = {row["name"]: row for row in engine.gathered(read(out / "quality.json") if engine.rank() == 0 else [])}
    if any(not isinstance(row.get("of"), dict) or row["of"] | asked != row["of"] for row in report.values()):
        raise TurboError(f"{out / 'quality.json'} is a report of other prompts. Choose another folder, or remove it.")
    changed = [name for name in of if name in report and report[name]["of"] != of[name]]
    if changed and not again:
        raise TurboError(
            f"{out / 'quality.json'} is a report of other files ({changed[0]}). Choose another folder, remove it, or "
            "measure the rows of changed files again: --again."
        )
    scenes, _, context, empty = prompts(folder, count, seed)
    known = _Prompts(scenes, context, empty, vae.load(folder / FILES["vae"]), seed)
    for row in (None, *rows):
        name = row.name if row else "VAE"
        if name not in report or name in changed:
            line = _measure(folder, row, known, log) if row else _vae_row(known, folder / FILES["vae"])
            report[name] = line | {"of": of[name]}
            _keep(_in_order(report), out)
    return _in_order(report)


def _in_order(report: dict[str, dict]) -> list[dict]:
    names = ["VAE", *(row.name for row in ROWS)]
    return sorted(report.values(), key=lambda row: names.index(row["name"]) if row["name"] in names else len(names))


class _Prompts(NamedTuple):
    """What every row is measured with; see prompts."""

    scenes: torch.Tensor
    context: torch.Tensor
    empty: torch.Tensor
    codec: torch.nn.Module
    seed: int


def _measure(folder: Path, row: Row, known: _Prompts, log) -> dict:
    """One row of the report; each process takes some of the batches."""
    model_at, size = load_row(folder, row)
    found = []  # (place, seconds, mark, square error of the first frame) of each clip
    for start in range(engine.rank() * BATCH, len(known.scenes), engine.processes() * BATCH):
        scenes, context = known.scenes[start : start + BATCH], known.context[start : start + BATCH].clone()
        seed = known.seed + start
        first, y = pictures(known.codec, scenes, seed) if row.file == "pair" else (None, None)
        began = time.perf_counter()
        latents = sample_row(model_at, row, context, known.empty, seed, y)
        seconds = (time.perf_counter() - began) / len(scenes)
        for i, (video, scene) in enumerate(zip(data.decode_latents(known.codec, latents), scenes)):
            apart = None if first is None else (video[:, 0].clamp(-1, 1) - first[i]).square().mean().item()
            found.append((start + i, seconds, judge.score(video, scene), apart))
        done = f"{min(len(found) * engine.processes(), len(known.scenes))}/{len(known.scenes)}"
        log(f"{row.name}: {done}, {sum(mark['all'] for _, _, mark, _ in found) / len(found):.0%} all right")
    _, seconds, marks, apart = zip(*sorted(engine.gathered(found), key=lambda clip: clip[0]))
    line = _summary(row, marks, known.scenes, sum(seconds) / len(seconds), size)
    return line | ({"first_frame": round(_psnr(apart), 2)} if row.file == "pair" else {})


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
    (high, size), (low, more) = (_load(folder / name, row.format) for name in _files(row))
    return lambda sigma: high if sigma >= BOUNDARY else low, size + more


def _load(path: Path, format: str | None) -> tuple[WanModel, int]:
    with tempfile.TemporaryDirectory() as aside:
        if format is not None:
            path = Path(checkpoint.quantize(path, Path(aside) / "quantized.safetensors", format).path)
        state, described = checkpoint.load(path)
        state = {name: tensor.clone() for name, tensor in state.items()}  # the file goes
        return WanModel.from_state_dict(state, torch.float32, num_heads=described.num_heads), path.stat().st_size


def _files(row: Row) -> list[str]:
    return list(PAIR.values()) if row.file == "pair" else [FILES[row.file]]


def read(path: Path) -> list[dict]:
    """A report as evaluate left it; an empty one when there is none."""
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TurboError(f"{path} is not a report ({error}). Remove it and evaluate again.") from error


def _vae_row(known: _Prompts, path: Path) -> dict:
    """PSNR of clips that went through the VAE, and what the judge reads in them: the most that any model can reach."""
    random = torch.Generator().manual_seed(7)
    error, marks = [], []
    for some in known.scenes[:32].split(4):
        video = clips.render(some, FRAMES, SIDE, SIDE, random)
        shown = data.decode_latents(known.codec, data.encode_latents(known.codec, video)).clamp(-1, 1)
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
    extra |= {"processes": engine.processes(), "threads": torch.get_num_threads()}  # that the seconds were taken with
    extra["motions"] = motions  # {motion: [read back, asked for]}
    return _scores(row.name, marks) | {"steps": row.steps} | extra


def _digest(folder: Path, files) -> str:
    """Tells apart the files that a row is about."""
    digest = hashlib.sha256()
    for name in files:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]


def _keep(report: list[dict], out: Path) -> None:
    if engine.rank() == 0:
        write_whole(out / "quality.json", json.dumps(report, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    try:
        with complete_or_nothing(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TurboError(f"Could not write {path} ({error}). Free space and start again.") from error
