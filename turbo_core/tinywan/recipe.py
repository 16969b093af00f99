"""The whole of TinyWan from nothing: VAE, text encoder, data, teacher, student, sparse attention, in this order; and on
request an image-to-video pair, two experts like those of Wan 2.2 A14B.

Every stage keeps a checkpoint in its own folder and writes one file when it is done: started again after a kill, the
recipe goes on where it was.
"""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..diagnostics import charts
from ..errors import TurboError, quoted
from ..pipeline.text import load_text_encoder
from ..train import distill, engine, models, precision, record, sparsify, teacher
from ..train.data import Data
from ..train.data import load as load_data
from ..train.data import save as save_data
from ..train.experts import BOUNDARY, Experts
from ..vae import load_vae
from . import FILES, PAIR, data, text, vae, world
from .presets import PRESETS

_PART = 100  # clips encoded into one file
_SIZE = "side", "frames"
_OF_ALL = "preset", "seed", *_SIZE  # settings of no stage


class _Run(NamedTuple):
    """What every stage is told."""

    work: Path
    seed: int
    device: Any
    log: Any

    def stage(self, folder: str, name: str, seed: int = 0) -> dict:
        """Arguments of a stage's train: its folder, its seed, and its name in the log."""
        log = self.log
        options = {"seed": self.seed + seed, "log": lambda line: log(f"{name}: {line}")}
        return {"folder": self.work / folder, **options}

    def of_all(self) -> dict:
        """What all stages depend on."""
        return {"seed": self.seed, "side": world.SIDE, "frames": world.FRAMES}

    def free(self, stages, made: dict):
        """(name of a setting) -> True as long as it may change: no stage from its own on has begun, or none at all
        where it is the size of all.

        stages: in order; made: {stage, without its number: a file that it makes}.
        """

        def begun(name):  # with a checkpoint, with clips encoded, or long over
            checkpoint, file = self.work / name / engine.CHECKPOINT, made.get(name.rstrip("0123456789"))
            encoded = any(self.work.glob(f"{name}*.safetensors"))
            return checkpoint.exists() or encoded or (file is not None and file.exists())

        to_come = set(itertools.takewhile(lambda name: not begun(name), reversed(stages)))
        to_come |= set(_SIZE) if len(to_come) == len(stages) else set()
        return lambda name: name in to_come or not (name in stages or name in _OF_ALL or begun(name))


def _by_stage(settings: dict, before: str = "") -> dict:
    """Settings by the name of the stage's folder, or of its data: those of TinyWan's stages in several parts apart."""
    flat = {}
    for name, value in settings.items():
        parts = {f"{before}{name}{i}": part for i, part in enumerate(value)} if isinstance(value, list) else None
        flat |= parts or {f"{before}{name}": value}
    return flat


def train(folder, preset: str = "cpu", seed: int = 0, device="cpu", pair: bool = False, log=print) -> list[Path]:
    """Make the family in a folder and return its files; folder/work keeps checkpoints, data and loss curves.

    device: of the transformer's stages. pair: the image-to-video experts too, from the teacher; a family that is
    there gets them added. Raises TurboError for an unknown preset, and for a folder made with another one or with other
    settings of a stage that has begun.
    """
    if preset not in PRESETS:
        raise TurboError(f"There is no preset {quoted(preset)}. Expected one of {', '.join(PRESETS)}.")
    folder, settings = Path(folder), PRESETS[preset]
    run = _Run(folder / "work", seed, device, log)
    files = {name: folder / file for name, file in FILES.items()}
    plain = _by_stage({name: value for name, value in settings.items() if name != "pair"})
    free = run.free(plain, files | {"decoder": files["vae"], "distill": files["student"], "sparsify": files["turbo"]})
    record.claim(run.work / "settings.json", {"preset": preset, **run.of_all(), **plain}, free=free)
    for file in files.values():
        file.parent.mkdir(exist_ok=True)

    if not files["vae"].exists():
        model, history = vae.train(**settings["vae"], **run.stage("vae", "VAE"))
        vae.finish(model, seed)
        options = {"model": model, "fixed_latents": True, **run.stage("decoder", "VAE decoder", 1)}
        model, more = vae.train(**settings["decoder"], **options)
        _write(run, lambda path: vae.save(model, path), files["vae"], history + more)
    if not files["text"].exists():
        state, history = text.train(**settings["text"], **run.stage("text", "text encoder"))
        _write(run, lambda path: text.save(state, path), files["text"], history)
    transformers = [files[name] for name in ("teacher", "student", "turbo")]
    known = None if _all_there(transformers) else _data(run, files, "data", settings["data"], seed)
    if not files["teacher"].exists():
        _teacher(
            run, files, "teacher", models.new_model(seed).to(device), known, settings["teacher"], [files["teacher"]]
        )
    if not files["student"].exists():
        _student(run, files, "distill", [files["teacher"]], known, settings["distill"], [files["student"]])
    if not files["turbo"].exists():
        _sparse(run, files, "sparsify", [files["student"]], known, settings["sparsify"], [files["turbo"]])
    return [*files.values(), *(_pair(run, folder, files, settings["pair"]) if pair else [])]


def _pair(run: _Run, folder: Path, files: dict, settings: dict) -> list[Path]:
    """The image-to-video experts: both begin as the text-to-video teacher, blind to the image."""
    made = [folder / name for name in PAIR.values()]
    if _all_there(made):
        return made
    taught, distilled = ([run.work / f"{kind}-{name}.safetensors" for name in PAIR] for kind in ("teacher", "student"))
    plain = _by_stage(settings, "pair-")
    free = run.free(plain, {"pair-teacher": taught[0], "pair-distill": distilled[0], "pair-sparsify": made[0]})
    record.claim(run.work / "pair.json", {**run.of_all(), **plain}, free=free)
    known = _data(run, files, "pair-data", settings["data"] | {"images": True}, run.seed + 1)
    if not _all_there(taught):
        both = (models.with_image(models.load_model(files["teacher"], run.device)) for _ in PAIR)
        _teacher(run, files, "pair-teacher", Experts(*both), known, settings["teacher"], taught)
    if not _all_there(distilled):
        _student(run, files, "pair-distill", taught, known, settings["distill"], distilled)
    _sparse(run, files, "pair-sparsify", distilled, known, settings["sparsify"], made)
    return made


def _all_there(files) -> bool:
    return all(file.exists() for file in files)


def _teacher(run: _Run, files: dict, name: str, model, known, stages: list[dict], outputs) -> None:
    _through(run, files, name, known, stages, outputs, model, teacher.train)


def _student(run: _Run, files: dict, name: str, teachers, known, stages: list[dict], outputs) -> None:
    student, guide, fake = (models.load_models(teachers, BOUNDARY, run.device) for _ in range(3))

    def train(model, clips, **options):
        return distill.train(model, guide, fake, clips, **options)

    _through(run, files, name, known, stages, outputs, student, train)


def _sparse(run: _Run, files: dict, name: str, students, known, stages: list[dict], outputs) -> None:
    sparse, dense = (models.load_models(students, BOUNDARY, run.device, sla) for sla in (True, False))

    def train(model, clips, **options):
        return sparsify.train(model, dense, clips, **options)

    _through(run, files, name, known, stages, outputs, sparse, train)


def _through(run: _Run, files: dict, name: str, known: Data, stages: list[dict], outputs, model, train) -> None:
    """Train a model stage by stage and write it, with the curves of all of them. more, in a preset: clips that a stage
    and later ones see beside those that are known."""
    history = []
    for i, options in enumerate(stages):
        options = options | run.stage(f"{name}{i}", f"{name} {i + 1}", i) | {"device": run.device}
        if more := options.pop("more", None):
            more = more | {"images": known.images is not None}
            known = data.joined([known, _data(run, files, f"{name}{i}-more", more, run.seed + 2)])
        model, steps = train(model.train().requires_grad_(True), known, **options)
        history += steps
    if engine.rank() == 0:
        charts.save(charts.history(outputs[0].stem, history), run.work / f"{outputs[0].stem}.png")
    models.save_models(model, outputs, world.WORLD)
    engine.wait()


def _data(run: _Run, files: dict, name: str, sizes: dict, seed: int) -> Data:
    """The clips of a stage, encoded where they are not yet."""
    encoded = run.work / f"{name}.safetensors"
    if not encoded.exists():
        _encode(files, encoded, sizes, seed, run.log)
    return load_data(encoded)


def _encode(files: dict, target: Path, sizes: dict, seed: int, log) -> None:
    """Encode clips for the transformer, some at a time: what is done survives a kill, and any number of processes
    makes the same data."""
    count = sizes["count"]
    parts = [target.with_name(f"{target.stem}{i:04d}.safetensors") for i in range(-(-count // _PART))]
    todo = [i for i, part in enumerate(parts) if i % engine.processes() == engine.rank() and not part.exists()]
    if todo:
        codec = load_vae(files["vae"], dtype=precision.dtype("cpu"))
        encoder, tokenize = load_text_encoder(files["text"], dtype=torch.float32)
        for i in todo:
            options = sizes | {"count": min(_PART, count - i * _PART), "seed": seed * 10_000 + i}
            save_data(data.make_clips(codec, encoder, tokenize, **options), parts[i])
            log(f"{target.stem}: part {i + 1} of {len(parts)}")
    engine.wait()
    if engine.rank() == 0:
        save_data(data.joined([load_data(part) for part in parts]), target)
        for part in parts:
            part.unlink()
    engine.wait()


def _write(run: _Run, write, path: Path, history: list[dict]) -> None:
    """Write a file of the family and the curves of its training, from the first process."""
    if engine.rank() == 0:
        charts.save(charts.history(path.stem, history), run.work / f"{path.stem}.png")
        write(path)
    engine.wait()
