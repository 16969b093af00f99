"""Opening a .pth or .safetensors file as named, memory-mapped tensors, without running anything that is in it."""

import difflib
import json
import math
import mmap
import os
import platform
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from ..disk import Disk, Source
from ..errors import TurboError, shown
from .places import Damaged, Place, Refused, Unreadable
from .pth import FEW, Checkpoint, checksums, numbers

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
# Linux's MAP_NORESERVE, which the mmap module names from Python 3.13 on; the number is that of these machines
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if platform.machine() in ("x86_64", "aarch64") else 0)
MAX_HEADER = 100_000_000  # bytes, as in the safetensors library
_MOST_AXES, _MOST_NUMBERS = 16, 1 << 60
_DEEPEST, _MOST_ITEMS = 16, 1 << 20  # containers within each other, values in a dump
DTYPES = {  # as safetensors names them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_UNUSED = {"U16", "U32", "U64", "F4", "F6_E2M3", "F6_E3M2", "C64"}  # types that safetensors has and no video model
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
    disk: Disk  # reads a tensor without touching the mapping; what had to be unpacked, or is small, is in memory


def open_tensors(path, writable: bool = False, contents: bool = True) -> TensorFile:
    """Open a checkpoint with its names as stored; dumps nested under "state_dict", "model", "ema" ... are entered.

    What a file is its content says, whatever its name. writable False: writing to a tensor crashes, and a file larger
    than the memory can be mapped on any system. writable True: writing changes a private copy of the page. contents
    False: tensors of a .pth that somebody packed with compression come without data, all others are mapped anyway.
    Raises TurboError when the file is missing, cut short, not a checkpoint, or a pickle that asks for anything but
    tensors (it is refused when it names it, and nothing is run).
    """
    path = Path(path)
    if os.path.isdir(path):
        raise TurboError(f"{path} is a folder. Expected one .pth or .safetensors file: name the file inside it.")
    if not os.path.isfile(path):  # Path's own raises for names that no disk takes
        raise TurboError(f"{path} does not exist.{_near_names(path)}")
    with _explained(path):
        is_pickle = _start(path)[:1] in (b"P", b"\x80") or path.suffix.lower() not in SAFETENSORS_SUFFIXES
        if is_pickle and not _has_header(path):
            file = _open_pickle(path, writable, contents)
        else:
            file = _open_safetensors(path, writable)
    for name, tensor in file.tensors.items():
        _check_writable(path, name, tensor)
    return file


@contextmanager
def _explained(path: Path):
    """What reading finds wrong with a file as a TurboError."""
    try:
        yield
    except PermissionError as error:
        raise TurboError(f"{path} may not be read. Check the rights to it.") from error
    except Refused as error:
        raise TurboError(
            f"{path} was refused: it tried to load something other than tensors ({error}), which could run code on "
            "this machine. Nothing was run. Expected a plain dictionary of tensors: use the published file or a "
            ".safetensors version."
        ) from error
    except (Damaged, OSError) as error:
        raise _foreign(path, str(error)[:200]) from error


def open_dump(path):
    """What a .pth holds, whatever it is nested in: a training run's dictionaries, lists and numbers, and tensors that
    are read from it.

    Raises TurboError as open_tensors does, and for what is nested without end.
    """
    path = Path(path)
    with _explained(path):
        source = Source(path)
        mapping = _map(source, writable=False)
        file, disk, left = Checkpoint(source, mapping), _disk(source, mapping), _MOST_ITEMS

        def filled(value, name, depth):
            nonlocal left
            left -= 1
            if depth > _DEEPEST or left < 0:
                raise Damaged("its content is nested without end")
            if isinstance(value, Place):
                return disk.read(file.tensor(name, value))
            if isinstance(value, Unreadable):
                raise Damaged(f"{shown(name)} is sparse, quantized by torch or without data")
            if isinstance(value, dict):
                return {key: filled(item, f"{name}.{key}"[-200:], depth + 1) for key, item in value.items()}
            if isinstance(value, (list, tuple)):
                return type(value)(filled(item, name, depth + 1) for item in value)
            return value

        return filled(file.content, "", 0)


def _check_writable(path, name, tensor) -> None:
    """Raise TurboError for what no safetensors file can hold."""
    if tensor.dtype not in DTYPES.values():
        raise TurboError(f"{path}: {shown(name)} is {tensor.dtype}. Expected floats, integers or booleans.")
    if name == "__metadata__" or not name.isprintable():  # a lone surrogate is not
        raise TurboError(f"{path}: a tensor is called {shown(name)}, which no file can name so. Save it without.")


def stored_checksums(path) -> list[tuple[int, int, int, str]]:
    """(start, end, checksum, name) of what a checkpoint can be held to while it is read; see pth.checksums."""
    return checksums(Source(path))


def _near_names(path: Path) -> str:
    if not os.path.isdir(path.parent):
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


def _map(source: Source, writable: bool) -> mmap.mmap:
    if not writable:
        return mmap.mmap(source.fd, len(source), access=mmap.ACCESS_READ)
    if sys.platform == "linux":
        # without NORESERVE the kernel wants memory for the case that every page gets written, and refuses a file
        # larger than what is free
        flags = mmap.MAP_PRIVATE | _NORESERVE
        return mmap.mmap(source.fd, len(source), flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(source.fd, len(source), access=mmap.ACCESS_COPY)


def _disk(source: Source, mapping: mmap.mmap) -> Disk:
    disk = Disk()
    disk.add(source, numbers(mapping, torch.uint8, 1, 0).data_ptr())
    return disk


def _has_header(path: Path) -> bool:
    """True where the file begins as a safetensors file does."""
    start = _start(path)
    return start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= MAX_HEADER


def _open_safetensors(path: Path, writable: bool) -> TensorFile:
    # read here and not by safetensors, which maps the file in a way that needs memory of its size (see _map)
    source = Source(path)
    size, length = len(source), int.from_bytes(source[:8], "little")
    if not 2 <= length <= min(size - 8, MAX_HEADER):
        raise Damaged(f"it has {size} bytes and the header would be {length} bytes long")
    header = _header(source[8 : 8 + length])
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise Damaged("its metadata are no dictionary")
    places = {name: _entry(path, name, entry) for name, entry in header.items()}
    start, end = 8 + length, 0
    mapping = _map(source, writable)
    tensors = {}
    for name, (dtype, shape, begin, stop) in sorted(places.items(), key=lambda item: item[1][2:]):
        count = math.prod(shape)
        if begin != end or stop - begin != count * dtype.itemsize:
            raise Damaged(f"the place of {shown(name)} in the file does not fit its shape {shape}")
        if start + stop > size:
            raise Damaged(f"{shown(name)} ends at byte {start + stop}, the file at {size}")
        end = stop
        few = stop - begin <= FEW
        buffer, at = (bytearray(source[start + begin : start + stop]), 0) if few else (mapping, start + begin)
        tensors[name] = numbers(buffer, dtype, count, at).reshape(shape)
    if start + end != size:
        raise Damaged(f"the tensors end at byte {start + end}, the file at {size}")
    notes = [] if path.suffix.lower() in SAFETENSORS_SUFFIXES else [f"a safetensors file, named {path.suffix}"]
    metadata = {str(k): str(v) for k, v in metadata.items()}
    return TensorFile("safetensors", metadata, tensors, notes, _disk(source, mapping))


def _header(text: bytes) -> dict:
    def once(pairs):
        found = dict(pairs)
        if len(found) != len(pairs):
            raise Damaged("its header has one name twice")
        return found

    try:
        header = json.loads(text, object_pairs_hook=once)
    except Damaged:
        raise
    except (ValueError, RecursionError) as error:
        raise Damaged(f"its header is not JSON ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise Damaged("its header is no dictionary")
    return header


def _entry(path, name, entry) -> tuple[torch.dtype, list[int], int, int]:
    """(dtype, shape, begin, end) of a tensor in the header."""
    fields = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        raise Damaged(f"{shown(name)} has no shape or place")
    if len(shape) > _MOST_AXES or any(type(n) is not int or n < 0 for n in (*shape, *offsets)):
        raise Damaged(f"{shown(name)} has no shape or place")
    if math.prod(max(n, 1) for n in shape) > _MOST_NUMBERS:  # an empty one may have sides that no tensor has
        raise Damaged(f"{shown(name)} has no shape or place")
    if isinstance(kind, str) and kind in _UNUSED:
        raise TurboError(
            f"{path}: {shown(name)} is {kind}. Expected floats, or integers that models use: another file."
        )
    if not isinstance(kind, str) or kind not in DTYPES:
        raise Damaged(f"{shown(name)} has the unknown type {shown(kind)}")
    return DTYPES[kind], shape, *offsets


def _open_pickle(path: Path, writable: bool, contents: bool) -> TensorFile:
    source = Source(path)
    if len(source) < 2:
        raise Damaged("it is empty")
    mapping = _map(source, writable)
    file = Checkpoint(source, mapping, contents)
    state, notes = _enter(file.content)
    tensors = {}
    for name, place in state.items() if isinstance(state, dict) else ():
        if not isinstance(name, str) or not isinstance(place, (Place, Unreadable)):
            continue
        if isinstance(place, Unreadable):
            what = "sparse, quantized by torch or without data"
            raise TurboError(f"{path}: {shown(name)} is {what}. Expected dense tensors.")
        tensors[name] = file.tensor(name, place)
    if not tensors:
        kind = type(file.content).__name__
        raise TurboError(f"{path} holds a {kind} without named tensors. Expected a model: use another file.")
    if path.suffix.lower() in SAFETENSORS_SUFFIXES:
        notes = [*notes, f"a PyTorch checkpoint, named {path.suffix}"]
    return TensorFile("pth", {}, tensors, notes, _disk(source, mapping))


def _tensors_in(content, depth: int, known: dict) -> int:
    """How many tensors are in a dictionary and those within it, so deep. known: what was counted, as dictionaries may
    hold one another many times."""
    if not isinstance(content, dict):
        return int(isinstance(content, (Place, Unreadable)))
    key = id(content), depth
    if key not in known:
        known[key] = 0  # a pickled dictionary may contain itself
        known[key] = sum(
            _tensors_in(value, depth - 1, known) for value in content.values() if depth or not isinstance(value, dict)
        )
    return known[key]


def _enter(content):
    """The dictionary inside a training dump that holds the network, and a note of where it was."""
    notes, known = [], {}
    for _ in range(3):
        if not isinstance(content, dict):
            break
        nested = {k: _tensors_in(v, 2, known) for k, v in content.items() if isinstance(v, dict)}
        most = max(nested.values(), default=0)
        if most <= _tensors_in(content, 0, known):
            break
        # among the large ones: an optimizer's few tensors, or a counter kept under "ema", are not the network
        candidates = [k for k, count in nested.items() if 2 * count >= most]
        name = next((k for k in _NESTED if k in candidates), candidates[0])
        notes.append(f"read from {shown(name)!r} of a training dump")
        content = content[name]
    return content, notes
