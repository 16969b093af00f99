"""The quality report: how much of a prompt comes true at each acceleration, read by the judge."""

import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import TurboError
from ..files import digest, write_whole
from ..train import engine, precision
from ..vae import decode_video, encode_video, load_vae
from . import FILES, judge, world
from .rows import ROWS, Row, files_of, load_row, pictures, prompts, sample_row

BATCH = 8


def evaluate(folder, out, count=320, seed=1000, rows=ROWS, again=False, log=print) -> list[dict]:
    """Measure the family in a folder and return the report, a dictionary a row; out/quality.json keeps each finished
    row, and a second call measures only what is missing there.

    count: prompts, the same ones, with the same noise, for every row; a sixteenth are combinations that training
    never saw. The processes of torchrun share them. The rows of the image-to-video pair are left out where the folder
    has none. again: rows of other files than those in the folder are measured again, or dropped where they are not
    asked for or the folder has none. Raises TurboError when a file is missing, when out holds a report of other
    prompts, and, without again, of other files.
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
    asked = {"count": count, "seed": seed, "frames": world.FRAMES, "side": world.SIDE}
    of = {name: asked | {"files": digest(files)} for name, files in _needs(folder).items()}
    # the first process's, in all of them
    report = {row["name"]: row for row in engine.gathered(read(out / "quality.json") if engine.rank() == 0 else [])}
    if any(row["of"] | asked != row["of"] for row in report.values()):
        raise TurboError(
            f"{out / 'quality.json'} is a report of other prompts or of another size. Choose another folder, or remove "
            "it."
        )
    changed = [name for name in report if report[name]["of"] != of.get(name)]
    if changed and not again:
        raise TurboError(
            f"{out / 'quality.json'} is a report of other files ({changed[0]}). Choose another folder, remove it, or "
            "measure the rows of changed files again: --again."
        )
    wanted = {name: row for name, row in {"VAE": None, **{row.name: row for row in rows}}.items() if name in of}
    gone = [name for name in changed if name not in wanted]
    for name in gone:
        del report[name]
    if gone:
        _keep(_in_order(report), out)
    scenes, _, context, empty = prompts(folder, count, seed)
    codec = load_vae(folder / FILES["vae"], dtype=precision.dtype("cpu"))
    known = _Prompts(scenes, context, empty, codec, seed)
    for name, row in wanted.items():
        if name not in report or name in changed:
            line = _measure(folder, row, known, log) if row else _vae_row(known, folder / FILES["vae"])
            report[name] = line | {"of": of[name]}
            _keep(_in_order(report), out)
    return _in_order(report)


def _needs(folder: Path) -> dict[str, list[Path]]:
    """{row: the files that it is about} of the rows that a folder has files for."""
    needs = {"VAE": [FILES["vae"]]} | {row.name: [FILES["vae"], FILES["text"], *files_of(row)] for row in ROWS}
    paths = {row: [folder / name for name in names] for row, names in needs.items()}
    return {row: files for row, files in paths.items() if all(file.is_file() for file in files)}


def _in_order(report: dict[str, dict]) -> list[dict]:
    return [report[name] for name in ("VAE", *(row.name for row in ROWS)) if name in report]


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
    found = []  # (place, CPU seconds of sampling, mark, square error of the first frame) of each clip
    for start in range(engine.rank() * BATCH, len(known.scenes), engine.processes() * BATCH):
        scenes, context = known.scenes[start : start + BATCH], known.context[start : start + BATCH].clone()
        seed = known.seed + start
        first, y = pictures(known.codec, scenes, seed) if row.file == "pair" else (None, None)
        began = time.process_time()
        latents = sample_row(model_at, row, context, known.empty, seed, y)
        seconds = (time.process_time() - began) / len(scenes)
        for i, (video, scene) in enumerate(zip(decode_video(known.codec, latents), scenes)):
            apart = None if first is None else (video[:, 0].clamp(-1, 1) - first[i]).square().mean().item()
            found.append((start + i, seconds, judge.score(video, scene), apart))
        done = f"{min(len(found) * engine.processes(), len(known.scenes))}/{len(known.scenes)}"
        log(f"{row.name}: {done}, {sum(mark['all'] for _, _, mark, _ in found) / len(found):.0%} all right")
    _, seconds, marks, apart = zip(*sorted(engine.gathered(found), key=lambda clip: clip[0]))
    line = _summary(row, marks, known.scenes, statistics.median(seconds), size)
    return line | ({"first_frame": round(_psnr(apart), 2)} if row.file == "pair" else {})


def read(path: Path) -> list[dict]:
    """A report as evaluate left it; an empty one when there is none."""
    if not path.is_file():
        return []
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TurboError(f"{path} is not a report ({error}). Remove it and evaluate again.") from error
    if not isinstance(report, list) or not all(isinstance(row, dict) and "name" in row for row in report):
        raise TurboError(f"{path} is not a report. Remove it and evaluate again.")
    if not all(isinstance(row.get("of"), dict) and "seconds" not in row for row in report):
        raise TurboError(f"{path} was made by an earlier version. Remove it and evaluate again.")
    return report


def _vae_row(known: _Prompts, path: Path) -> dict:
    """PSNR of clips that went through the VAE, and what the judge reads in them: the most that any model can reach."""
    random = torch.Generator().manual_seed(7)
    error, marks = [], []
    for some in known.scenes[:32].split(4):
        video = world.render(some, world.FRAMES, world.SIDE, world.SIDE, random)
        shown = decode_video(known.codec, encode_video(known.codec, video))
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
    held = [mark["all"] for mark, scene in zip(marks, scenes) if world.is_held_out(scene)]
    motions = {}
    for mark, scene in zip(marks, scenes):
        right = motions.setdefault(world.describe(scene)["motion"], [0, 0])
        right[0] += mark["motion"]
        right[1] += 1
    extra = {"held_out": sum(held), "held_out_count": len(held), "cpu_seconds": round(seconds, 3), "bytes": size}
    extra["computed"] = "float32" if row.guidance is None else str(precision.dtype("cpu")).removeprefix("torch.")
    extra |= {"processes": engine.processes(), "threads": torch.get_num_threads()}  # that the seconds were taken with
    extra["motions"] = motions  # {motion: [read back, asked for]}
    extra["true"] = "".join(str(int(mark["all"])) for mark in marks)  # of each prompt, so that rows can be paired
    return _scores(row.name, marks) | {"steps": row.steps} | extra


def _keep(report: list[dict], out: Path) -> None:
    if engine.rank() == 0:
        write_whole(out / "quality.json", json.dumps(report, indent=1) + "\n")
