"""Opening a .pth or .safetensors file as named, memory-mapped tensors, without running anything that is in it."""

import difflib
import json
import math
import mmap
import pickle
import platform
import re
import sys
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import TurboError

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
# Linux's MAP_NORESERVE, which the mmap module names from Python 3.13 on; the number is that of these machines
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if platform.machine() in ("x86_64", "aarch64") else 0)
MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
DTYPES = {  # as safetensors names them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
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
    zipfile.BadZipFile,
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


def open_tensors(path, writable: bool = False) -> TensorFile:
    """Open a checkpoint with its names as stored; dumps nested under "state_dict", "model", "ema" ... are entered.

    writable False: writing to a tensor crashes, and a file larger than the memory can be mapped on any system.
    writable True: writing changes a private copy of the page. Old non-zip .pth files cannot be mapped and are read
    whole. Raises TurboError when the file is missing, cut short, not a checkpoint, or a pickle that asks for anything
    but tensors (it is refused before it can run).
    """
    path = Path(path)
    if path.is_dir():
        raise TurboError(f"{path} is a folder. Expected one .pth or .safetensors file: name the file inside it.")
    if not path.is_file():
        raise TurboError(f"{path} does not exist.{_near_names(path)}")
    try:
        if path.suffix.lower() in SAFETENSORS_SUFFIXES:
            return _open_safetensors(path, writable)
        return _open_pickle(path, writable)
    except PermissionError as error:
        raise TurboError(f"{path} may not be read. Check the rights to it.") from error
    except _DAMAGE as error:
        if isinstance(error, TurboError):
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        raise _foreign(path, lines[0][:200]) from error


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


def _map(path: Path, writable: bool) -> mmap.mmap:
    with open(path, "rb") as file:
        if not writable:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if sys.platform == "linux":
            # without NORESERVE the kernel wants memory for the case that every page gets written, and refuses a file
            # larger than what is free
            flags = mmap.MAP_PRIVATE | _NORESERVE
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _tensor(mapping: mmap.mmap, dtype: torch.dtype, offset: int, count: int):
    if count == 0:
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset)


def _open_safetensors(path: Path, writable: bool) -> TensorFile:
    # read here and not by safetensors, which maps the file in a way that needs memory of its size (see _map)
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER):
            raise ValueError(f"it has {size} bytes and the header would be {length} bytes long")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    start, end = 8 + length, 0
    mapping = _map(path, writable)
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (begin, stop) = DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"]
        if dtype is None:
            raise ValueError(f"{name} has the unknown type {entry['dtype']}")
        count = math.prod(shape)
        if begin != end or stop - begin != count * dtype.itemsize or min(shape, default=0) < 0:
            raise ValueError(f"the place of {name} in the file does not fit its shape {shape}")
        if start + stop > size:
            raise ValueError(f"{name} ends at byte {start + stop}, the file at {size}")
        end = stop
        tensors[name] = _tensor(mapping, dtype, start + begin, count).reshape(shape)
    if start + end != size:
        raise ValueError(f"the tensors end at byte {start + end}, the file at {size}")
    return TensorFile("safetensors", {str(k): str(v) for k, v in metadata.items()}, tensors, [])


def _open_pickle(path: Path, writable: bool) -> TensorFile:
    is_zip = _start(path).startswith(b"PK\x03\x04")
    try:
        content = _places(path) if is_zip else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted or is_zip:
            raise TurboError(
                f"{path} was refused: it tried to load something other than tensors "
                f"({wanted[1] if wanted else 'an unknown object'}), which could run code on this machine. Nothing was "
                "run. Expected a plain dictionary of tensors: use the published file or a .safetensors version."
            ) from error
        raise _foreign(path, "it is not a PyTorch file") from error
    state, notes = _enter(content)
    if not isinstance(state, dict) or not _tensors_in(state, 0):
        kind = type(content).__name__
        raise TurboError(f"{path} holds a {kind} without named tensors. Expected a model: use another file.")
    tensors = {k: v.detach() for k, v in state.items() if isinstance(k, str) and torch.is_tensor(v)}
    mapping = _map(path, writable) if is_zip else None
    for name, tensor in tensors.items():
        place = None
        if tensor.layout == torch.strided and not tensor.is_quantized:
            place = getattr(tensor.untyped_storage(), "_checkpoint_offset", None) if is_zip else 0
        if place is None:
            raise TurboError(f"{path}: {name} is sparse, quantized by torch or without data. Expected dense tensors.")
        if is_zip:
            count = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
            flat = _tensor(mapping, tensor.dtype, place, count)
            tensors[name] = flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return TensorFile("pth", {}, tensors, notes, is_zip)


def _places(path: Path):
    """The content of a zip .pth with tensors that have no data, only its place in the file (_checkpoint_offset)."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it was packed again, with compression")
    # weights_only: the unpickler knows tensors and plain containers only and never calls anything else
    if torch.__version__ >= "2.11":
        return torch.load(path, map_location="meta", weights_only=True)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.load(path, map_location="cpu", weights_only=True)


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
