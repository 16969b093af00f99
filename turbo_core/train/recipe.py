"""The whole of TinyWan from nothing: VAE, text encoder, data, teacher, student, sparse attention, in this order.

Every stage keeps a checkpoint in its own folder and writes one file of the family when it is done: started again after
a kill, the recipe goes on where it was.
"""

import json
from pathlib import Path

import torch

from ..errors import TurboError
from ..text import load_text_encoder
from ..tinywan import FILES
from ..video import complete_or_nothing
from . import clips, curves, data, distill, engine, models, sparsify, teacher, text, vae

# steps and sizes of each stage; batches are of one process. "cpu" is meant for two processes on two cores and three
# hours, "gpu" for one card; "try" shows in a minute that all of it works, and learns nothing
_PART = 100  # clips encoded into one file
PRESETS = {
    "cpu": {
        "vae": {"dim": 8, "steps": 1500, "image_steps": 600},
        "decoder": {"steps": 1400, "image_steps": 0, "muon_lr": 0.012, "lr": 1.2e-3},
        "text": {"steps": 300},
        "data": {"count": 2800},
        "teacher": [
            {"steps": 900, "batch": 12, "kept_frames": 2, "muon_lr": 5e-3, "lr": 2e-3, "decay": 0.996},
            {"steps": 1600, "batch": 12, "kept_frames": 5, "muon_lr": 3e-3, "lr": 1.5e-3, "decay": 0.995},
            {"steps": 1000, "batch": 8, "muon_lr": 2.7e-3, "lr": 1.3e-3, "decay": 0.995},
        ],
        "distill": [{"steps": 420, "batch": 8, "kept_frames": 5}],
        "sparsify": {"steps": 600, "batch": 6, "muon_lr": 8e-4, "lr": 1.5e-3},
    },
    "gpu": {
        "vae": {"dim": 8, "steps": 8000, "image_steps": 1000, "batch": 32},
        "decoder": {"steps": 8000, "image_steps": 0, "batch": 32},
        "text": {"steps": 1000},
        "data": {"count": 8000},
        "teacher": [
            {"steps": 6000, "batch": 64, "kept_frames": 2, "muon_lr": 5e-3, "lr": 2e-3},
            {"steps": 12000, "batch": 64, "muon_lr": 3e-3, "lr": 1.5e-3},
        ],
        "distill": [{"steps": 4000, "batch": 32}],
        "sparsify": {"steps": 2000, "batch": 32},
    },
    "try": {
        "vae": {"dim": 8, "steps": 4, "image_steps": 2, "pool": 4},
        "decoder": {"steps": 1, "image_steps": 0, "pool": 2},
        "text": {"steps": 4, "batch": 4},
        "data": {"count": 4, "frames": 9, "side": 64},
        "teacher": [{"steps": 2, "batch": 2, "kept_frames": 2}, {"steps": 2, "batch": 2}],
        "distill": [{"steps": 4, "batch": 2}],
        "sparsify": {"steps": 2, "batch": 2},
    },
}


def train(folder, preset: str = "cpu", seed: int = 0, device="cpu", log=print) -> list[Path]:
    """Make the family in a folder and return its files; folder/work keeps checkpoints, data and loss curves.

    device: of the transformer's stages. Raises TurboError for an unknown preset, or a folder made with another one.
    """
    if preset not in PRESETS:
        raise TurboError(f"There is no preset {preset!r}. Expected one of {', '.join(PRESETS)}.")
    folder = Path(folder)
    work, settings = folder / "work", PRESETS[preset]
    _claim(work, {"preset": preset, "seed": seed, **settings})
    files = {name: folder / file for name, file in FILES.items()}

    if not files["vae"].exists():
        model, history = vae.train(work / "vae", **settings["vae"], seed=seed, log=_named(log, "VAE"))
        vae.finish(model, seed)
        options = {"model": model, "fixed_latents": True, "seed": seed + 1, "log": _named(log, "VAE decoder")}
        model, more = vae.train(work / "decoder", **settings["decoder"], **options)
        _write(lambda path: vae.save(model, path), files["vae"], history + more)
    if not files["text"].exists():
        state, history = text.train(work / "text", **settings["text"], seed=seed, log=_named(log, "text encoder"))
        _write(lambda path: text.save(state, path), files["text"], history)
    encoded = work / "data.safetensors"
    if not encoded.exists():
        _encode(files, encoded, settings["data"], seed, log)
    known = data.load(encoded)

    if not files["teacher"].exists():
        model = models.new_model(seed).to(device)
        for i, stage in enumerate(settings["teacher"]):
            model, history = teacher.train(
                model.train().requires_grad_(True), known, work / f"teacher{i}", **stage, seed=seed + i, device=device,
                log=_named(log, f"teacher {i + 1}"),
            )  # fmt: skip
        _write(lambda path: models.save_model(model, path, clips.WORLD), files["teacher"], history)
    if not files["student"].exists():
        student, fake, guide = (models.load_model(files["teacher"], device) for _ in range(3))
        for i, stage in enumerate(settings["distill"]):
            student, history = distill.train(
                student.train().requires_grad_(True), guide, fake, known, work / f"distill{i}", **stage, seed=seed + i,
                device=device, log=_named(log, f"rCM {i + 1}"),
            )  # fmt: skip
        _write(lambda path: models.save_model(student, path, clips.WORLD), files["student"], history)
    if not files["turbo"].exists():
        sparse, dense = (
            models.load_model(files["student"], device, sla=True),
            models.load_model(files["student"], device),
        )
        sparse, history = sparsify.train(
            sparse, dense, known, work / "sparsify", **settings["sparsify"], seed=seed, device=device,
            log=_named(log, "SLA"),
        )  # fmt: skip
        _write(lambda path: models.save_model(sparse, path, clips.WORLD), files["turbo"], history)
    return list(files.values())


def _encode(files: dict, target: Path, sizes: dict, seed: int, log) -> None:
    """Encode clips for the transformer, some at a time: what is done survives a kill, and any number of processes
    makes the same data."""
    count = sizes["count"]
    parts = [target.with_name(f"data{i:04d}.safetensors") for i in range(-(-count // _PART))]
    todo = [i for i, part in enumerate(parts) if i % engine.processes() == engine.rank() and not part.exists()]
    if todo:
        codec, (encoder, tokenize) = vae.load(files["vae"]), load_text_encoder(files["text"], dtype=torch.float32)
        for i in todo:
            options = sizes | {"count": min(_PART, count - i * _PART), "seed": seed * 10_000 + i}
            data.save(data.make_clips(codec, encoder, tokenize, **options), parts[i])
            log(f"data: part {i + 1} of {len(parts)}")
    engine.wait()
    if engine.rank() == 0:
        data.save(data.joined([data.load(part) for part in parts]), target)
        for part in parts:
            part.unlink()
    engine.wait()


def _claim(work: Path, settings: dict) -> None:
    """Make the folder for one preset and seed, or find it made for the same."""
    record = work / "settings.json"
    try:
        work.mkdir(parents=True, exist_ok=True)
        if record.exists():
            if json.loads(record.read_text(encoding="utf-8")) != settings:
                raise TurboError(
                    f"{work} belongs to a training with other settings. Take another folder, or remove it."
                )
        elif engine.rank() == 0:
            with complete_or_nothing(record) as part:
                part.write_text(json.dumps(settings), encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, TurboError):
            raise
        raise TurboError(f"{work} cannot be used for training ({error}). Choose another folder.") from error


def _named(log, stage: str):
    return lambda line: log(f"{stage}: {line}")


def _write(write, path: Path, history: list[dict]) -> None:
    """Write a file of the family and the curves of its training, from the first process."""
    if engine.rank() == 0:
        curves.draw(history, path.parent / "work" / f"{path.stem}.png")
        write(path)
    engine.wait()
