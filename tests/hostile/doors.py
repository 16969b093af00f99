"""The doors of turbo_core that take what strangers made, each opened with a hostile input."""

import io
import math
import os
import time
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tests.hostile.dumps import small_parts
from turbo_core import checkpoint, cli
from turbo_core.batch import Manifest, read_jobs
from turbo_core.checkpoint import lora_names
from turbo_core.checkpoint.read import open_tensors
from turbo_core.errors import TurboError
from turbo_core.lora.read import LoraFile
from turbo_core.pipeline import Clip
from turbo_core.pipeline.text import encode_text, load_text_encoder
from turbo_core.pipeline.video import read_image, read_made
from turbo_core.train import data, engine
from turbo_core.train.videos import read_video
from turbo_core.vae import load_vae

MOST = 400  # characters of a message beyond the path
LAYERS = [f"blocks.{n}.{layer}" for n in range(2) for layer in ("self_attn.q", "cross_attn.k", "ffn.0", "ffn.2")]

_SHAPES = {f"{layer}.weight": (8, 8) for layer in LAYERS} | {f"{layer}.bias": (8,) for layer in LAYERS}


class Found:
    """What came of the doors that one input went through: {outcome: the first detail}."""

    def __init__(self):
        self.outcomes = {}

    def add(self, outcome: str, detail: str = ""):
        self.outcomes.setdefault(outcome, detail[:600])

    def error(self, text: str, names):
        """A message for the person."""
        left = text
        for name in sorted(names, key=len, reverse=True):
            left = left.replace(name, "")
        wrong = [
            why
            for why, holds in (
                ("not one line, or not printable", not text.isprintable()),
                (f"{len(left)} characters", len(left) > MOST),
                ("names no file", bool(names) and left == text and not any(Path(n).name in text for n in names)),
            )
            if holds
        ]
        self.add("unclear" if wrong else "clear", f"{', '.join(wrong)}: {text}" if wrong else text)

    @contextmanager
    def door(self, *names):
        """A block that may raise TurboError, and nothing else."""
        try:
            yield
        except TurboError as error:
            self.error(str(error), [str(name) for name in names])
        except Exception as error:
            ours = [step for step in traceback.extract_tb(error.__traceback__) if "turbo_core" in step.filename]
            where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "outside"
            self.add(
                "over 1 GB" if isinstance(error, MemoryError) else "traceback",
                f"{type(error).__name__}: {error} {where}",
            )


def _same(found, path, same):
    """Hold what was taken to what it must be, bit for bit."""
    stored = open_tensors(path).tensors
    for name, expected in same.items():
        got = stored.get(name)
        if got is None or got.dtype != expected.dtype or got.shape != expected.shape or not _bits(got, expected):
            found.add("wrong", f"{name} is not as it was saved")
            return


def _bits(a, b):
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def _checkpoint(found, case, folder, finite=True):
    path, *shards = (folder / name for name in case.files)
    taken = None
    with found.door(path, *shards):
        taken = checkpoint.inspect(path)
    state = None
    with found.door(path, *shards):
        state, _ = checkpoint.load(path)
    if state is not None and case.same is not None:
        _same(found, path, case.same)
    for format in ("bf16", "int8_block"):
        _convert(found, case, (path, *shards), folder / "out.safetensors", format, finite)
        if taken is None:
            break  # what cannot be opened cannot be converted, in any format
    if case.refuse and (taken is not None or state is not None):
        found.add("wrong", f"taken, though {case.refuse}")


def _convert(found, case, paths, target, format, finite):
    done = None
    before = set(target.parent.iterdir())
    with found.door(*paths, target):
        done = checkpoint.convert(paths[0], target, format)
    left = set(target.parent.iterdir()) - before - {target}
    if left or (done is None and target.exists()):
        found.add("damaged", f"left behind: {[p.name for p in left] or target.name}")
    if done is None:
        return
    if not finite:
        found.add("wrong", "NaN or infinity was converted")
    _read_back(found, target)
    target.unlink()


def _read_back(found, target):
    try:
        state, _ = checkpoint.load(target)
        ill = [
            name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.float().isfinite().all()
        ]
    except Exception as error:
        found.add("damaged", f"its own output: {type(error).__name__}: {error}")
    else:
        if ill:
            found.add("damaged", f"its own output holds NaN or infinity in {ill[0]}")


def _finite(found, case, folder):
    _checkpoint(found, case, folder, finite=False)


def _honest(found, case, folder):
    _checkpoint(found, case, folder)
    if "clear" in found.outcomes:
        found.add("wrong", f"refused, though honest: {found.outcomes['clear']}")


def _header(found, case, folder):
    """Held to the safetensors library where both read it."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / next(iter(case.files))
    with suppress(SafetensorError, KeyError, RuntimeError, ValueError):
        known = load(case.files[path.name])
        case = case._replace(same=known)
    _checkpoint(found, case, folder)


def _merge(found, case, folder):
    paths, target = [folder / name for name in case.files], folder / "out.safetensors"
    format, strength = case.arguments
    done = None
    with found.door(*((*paths, target) if math.isfinite(strength) else ())):
        done = checkpoint.merge(paths[0], paths[1], [paths[2]], target, format, strength)
    if any(folder.glob("*.part")) or (done is None and target.exists()):
        found.add("damaged", "something is left behind")
    if done is not None:
        _read_back(found, target)


def _encoder(found, case, folder):
    path = folder / next(iter(case.files))
    tokenizer = folder / (case.arguments or ("spiece.model",))[0]
    with found.door(path, tokenizer):
        encoder, tokenize = load_text_encoder(path, tokenizer, dtype=torch.float32)
        encode_text(encoder, tokenize, ["a red circle moves left"])
        if case.refuse:
            found.add("wrong", f"taken, though {case.refuse}")


def _vae(found, case, folder):
    path = folder / next(iter(case.files))
    with found.door(path):
        load_vae(path)
        if case.refuse:
            found.add("wrong", f"taken, though {case.refuse}")


def _picture(found, case, folder):
    path = folder / next(iter(case.files))
    with found.door(path):
        image = read_image(path)
        if case.refuse or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            found.add("wrong", f"taken, though {case.refuse or 'not three channels'}")
        elif case.same and not torch.equal(image, case.same["image"]):
            found.add("wrong", f"{image.flatten()[:3]} is not what was drawn")


def _shown(found, case, folder):
    """What inspect prints of a good file that says of itself what a terminal would obey."""
    out = io.StringIO()
    with redirect_stdout(out):
        status = cli.main(["inspect", next(iter(case.files))])
    if status or not all(line.isprintable() for line in out.getvalue().splitlines()):
        found.add("unclear", f"exit {status} with {out.getvalue()!r}")


def _lora(found, case, folder):
    with found.door():
        for name in case.arguments:
            lora_names.split_name(name)
        lora_names.in_comfyui_names(case.arguments, LAYERS)
        lora_names.why_not(case.arguments, LAYERS)
    path = folder / "lora.safetensors"
    try:
        halves = {n: torch.ones((4, 8) if "down" in n or "_A" in n else (8, 4)) for n in case.arguments}
        save_file(halves, path)
    except (UnicodeError, ValueError, SafetensorError):
        return  # no file has such names
    with found.door(path):
        LoraFile(path, _SHAPES, "Wan")


def _training(found, case, folder):
    path = folder / next(iter(case.files))
    with found.door(path):
        known = data.load(path)
        for seed in range(3):
            latents, told = data.batch(known, 2, torch.Generator().manual_seed(seed), 0.1)
            if latents.ndim != 5 or not told["context"].isfinite().all():
                found.add("wrong", "a batch of NaN")


def _resumed(found, case, folder):
    """A training that goes on from a checkpoint."""
    parts, path = small_parts(), folder / "checkpoint.pt"
    with found.door(path):
        history = engine.load(parts, path)
        if case.refuse:
            found.add("wrong", f"taken, though {case.refuse}")
        # what was taken is used: weights that lie in a file would end the process
        parts["model"](torch.ones(1, 8)).sum().backward()
        try:
            parts["optimizer"].step()
        except Exception:  # options of an optimizer may be anything; torch tells
            history = []
        sum(value for step in history for value in step.values())


def _video(found, case, folder):
    path = folder / next(iter(case.files))
    with found.door(path):
        frames = read_video(path, 5)
        if case.refuse or frames.shape[:2] != (5, 3):
            found.add("wrong", f"taken, though {case.refuse or frames.shape}")
    with found.door(path):
        read_made(path)


def _jobs(found, case, folder):
    path = folder / next(iter(case.files))
    with found.door(path):
        known, faults = read_jobs(path, Clip(prompt=""))
        for fault in faults:
            found.error(fault.error, [])
        names = [job.name.lower() for job in known]
        if len(set(names)) < len(names) or any(os.path.basename(name) != name or name[0] == "." for name in names):
            found.add("wrong", f"names of files {names[:5]}")
        with Manifest(folder / "out") as manifest:
            if any(manifest.is_done(job) for job in known):
                found.add("wrong", "done, though no video is there")


def _command(found, case, folder):
    out, err, status = io.StringIO(), io.StringIO(), None
    for name in ("pipe.mp4", "pipe.safetensors"):  # must be neither waited for nor replaced
        os.mkfifo(folder / name)
    before = set(folder.rglob("*"))
    try:
        with redirect_stdout(out), redirect_stderr(err):
            status = cli.main(list(case.arguments))
    except SystemExit as error:
        status = error.code or 0
    except Exception as error:
        found.add("traceback", f"{type(error).__name__}: {error}, {case.arguments}")
        return
    if any(path.name.endswith((".part", "-lock")) for path in folder.rglob("*")):
        found.add("damaged", f"left behind: {set(folder.rglob('*')) - before}")
    if not all((folder / name).is_fifo() for name in ("pipe.mp4", "pipe.safetensors")):
        found.add("damaged", f"a pipe was replaced, {case.arguments}")
    text = err.getvalue()
    lines = [line for line in text.splitlines() if line.startswith("turbo-core") or ": error:" in line]
    # inspect goes on to the next file
    most = max(1, len(case.arguments) - 1) if case.arguments[:1] == ("inspect",) else 1
    if status == 0:
        found.add("fine")
    elif status == 70:
        found.add("traceback", f"{lines[-1:]}, {case.arguments}")
    elif status != 2 or not 0 < len(lines) <= most or text.splitlines()[-len(lines) :] != lines:
        found.add("unclear", f"exit {status} with {text[-300:]!r}, {case.arguments}")
    else:
        given = [word.partition("=")[2] or word for word in case.arguments]
        for line in lines:
            found.error(line, [])
            long = len(line) - sum(len(word) * line.count(word) for word in given if len(word) > 40)
            if found.outcomes.get("unclear", "").endswith(line) and line.isprintable() and long <= MOST:
                del found.outcomes["unclear"]
            found.add("clear", lines[0])


DOORS = {
    "checkpoint": _checkpoint, "finite": _finite, "honest": _honest, "header": _header, "merge": _merge,
    "encoder": _encoder, "vae": _vae, "picture": _picture, "lora": _lora, "training": _training, "command": _command,
    "shown": _shown, "resumed": _resumed, "video": _video, "jobs": _jobs,
}  # fmt: skip


def opened(case, folder: Path) -> dict[str, str]:
    """{outcome: detail} of a case whose files lie in the folder."""
    found = Found()
    began = time.process_time()
    DOORS[case.door](found, case, folder)
    spent = time.process_time() - began
    if spent > 5:
        found.add("hang", f"{spent:.1f} s")
    if not found.outcomes:
        found.add("fine")
    return found.outcomes
