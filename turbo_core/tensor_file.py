"""Opening a .pth or .safetensors file as named, memory-mapped tensors, without running anything that is in it."""

import difflib
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import torch

from .errors import TurboError

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
# what the restricted unpickler and the zip reader raise on a damaged file, besides UnpicklingError
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
_NOT_A_CHECKPOINT = {
    b"GGUF": "a GGUF file. ComfyUI-GGUF loads those; here use the .pth or .safetensors version",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself. Run `git lfs pull` or download the file",
    b"<!DOCTYPE": "a web page, saved in place of the file. Download the file itself",
    b"<html": "a web page, saved in place of the file. Download the file itself",
}
# Keys under which training code keeps the network in its dumps. Averaged weights are what gets published, so they
# come first; the choice is told in the notes.
_NESTED = ("ema", "net_ema", "model_ema", "generator_ema", "state_dict", "model", "net", "generator", "module")


class TensorFile(NamedTuple):
    """An open checkpoint. The tensors lie in the mapped file: nothing is read until they are touched."""

    container: str  # "pth" or "safetensors"
    metadata: dict[str, str]
    tensors: dict[str, torch.Tensor]
    notes: list[str]
    mapped: bool = True  # False: an old non-zip .pth, read whole


def open_tensors(path) -> TensorFile:
    """Open a checkpoint with its names as stored; dumps nested under "state_dict", "model", "ema" ... are entered.

    Old non-zip .pth files cannot be mapped and are read whole. Raises TurboError when the file is missing, cut short,
    not a checkpoint, or a pickle that asks for anything but tensors (it is refused before it can run).
    """
    path = Path(path)
    if path.is_dir():
        raise TurboError(f"{path} is a folder. Expected one .pth or .safetensors file: name the file inside it.")
    if not path.is_file():
        raise TurboError(f"{path} does not exist.{_near_names(path)}")
    if path.suffix.lower() in SAFETENSORS_SUFFIXES:
        return _open_safetensors(path)
    return _open_pickle(path)


def _near_names(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either. Check the path."
    names = [p.name for p in path.parent.iterdir() if p.is_file()]
    near = difflib.get_close_matches(path.name, names, 3, 0.6)
    return f" Did you mean {' or '.join(near)}?" if near else f" Nothing in {path.parent} has a similar name."


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(64)


def _foreign(path: Path, reason: str) -> TurboError:
    start = _start(path)
    for magic, kind in _NOT_A_CHECKPOINT.items():
        if start.startswith(magic):
            return TurboError(f"{path} is {kind}.")
    size = path.stat().st_size
    return TurboError(
        f"{path} ({size:,} bytes) is damaged, cut short or not a checkpoint: {reason}. "
        "Expected a PyTorch .pth or a .safetensors file. Compare its size with the published one and download it again."
    )


def _open_safetensors(path: Path) -> TensorFile:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, AttributeError) as error:  # AttributeError: a dtype that this torch lacks
        raise _foreign(path, str(error)) from error
    return TensorFile("safetensors", metadata, tensors, [])


def _open_pickle(path: Path) -> TensorFile:
    is_zip = _start(path).startswith(b"PK\x03\x04")
    try:
        # weights_only: the unpickler knows tensors and plain containers only and never calls anything else
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted or is_zip:
            raise TurboError(
                f"{path} was refused: it tried to load something other than tensors "
                f"({wanted[1] if wanted else 'an unknown object'}), which could run code on this machine. Nothing was "
                "run. Expected a plain dictionary of tensors: use the published file or a .safetensors version."
            ) from error
        raise _foreign(path, "it is not a PyTorch file") from error
    except _DAMAGE as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise _foreign(path, lines[0][:200]) from error
    state, notes = _enter(content)
    if not isinstance(state, dict) or not _tensors_in(state, 0):
        kind = type(content).__name__
        raise TurboError(f"{path} holds a {kind} without named tensors. Expected a model: use another file.")
    tensors = {k: v.detach() for k, v in state.items() if isinstance(k, str) and torch.is_tensor(v)}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise TurboError(f"{path}: {name} is sparse, quantized by torch or without data. Expected dense tensors.")
    return TensorFile("pth", {}, tensors, notes, is_zip)


def _tensors_in(content, depth: int) -> int:
    if not isinstance(content, dict):
        return int(torch.is_tensor(content))
    return sum(_tensors_in(v, depth - 1) for v in content.values() if depth or torch.is_tensor(v))


def _enter(content):
    """The dictionary inside a training dump that holds the network, and a note of where it was."""
    notes = []
    for _ in range(3):  # a pickled dictionary may contain itself
        if not isinstance(content, dict):
            break
        nested = {k: _tensors_in(v, 2) for k, v in content.items() if isinstance(v, dict)}
        most = max(nested.values(), default=0)
        if most <= _tensors_in(content, 0):
            break
        # among the large ones: an optimizer's few tensors, or a counter kept under "ema", are not the network
        candidates = [k for k, count in nested.items() if 2 * count >= most]
        name = next((k for k in _NESTED if k in candidates), candidates[0])
        notes.append(f"read from {name!r} of a training dump")
        content = content[name]
    return content, notes
