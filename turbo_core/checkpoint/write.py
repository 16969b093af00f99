"""Writing a safetensors file one tensor at a time, aside, and renamed when it is whole."""

import errno
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import TurboError
from ..files import check_free, written_aside
from .read import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_IN_USE = (
    "Check the rights to that folder, and that no program has the file open (ComfyUI has, while its MODEL is loaded): "
    "or choose another name."
)
_ALIGNMENT = 64  # bytes: a cache line, and what torch gives its own tensors
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def stream_safetensors(target, layout: Layout, tensors: Iterable, metadata: dict[str, str]) -> int:
    """Write (name, tensor) pairs, in any order, to a safetensors file of the given layout; returns its size in bytes.

    layout: {name: (dtype, shape)} of every tensor that will come; the header is written from it first. The file takes
    the target's place when everything is on the disk: an existing target stays as it was until then, and nothing is
    left over after a failure or an interrupt. Raises TurboError when there is no room or no right to write.
    """
    target = Path(target)
    header, places, size = file_header(layout, metadata)
    check_target(target, size)
    waiting = set(layout)
    with _explained(target), written_aside(target) as aside, open(aside, "wb") as file:
        file.write(header)
        for name, tensor in tensors:
            dtype, shape = layout[name]
            assert tensor.dtype == dtype and tuple(tensor.shape) == tuple(shape), name
            waiting.remove(name)
            file.seek(len(header) + places[name])
            _put(file, tensor)
        assert not waiting, f"never written: {sorted(waiting)[:3]}"
    return size


def write_safetensors(target, state: dict[str, torch.Tensor], metadata: dict[str, str]) -> int:
    """Write a state dict that is there as a whole; see stream_safetensors."""
    return stream_safetensors(
        target, {name: (x.dtype, tuple(x.shape)) for name, x in state.items()}, state.items(), metadata
    )


def check_name(target: Path) -> None:
    """Raise TurboError unless a file to be written has a .safetensors name that a disk takes and nobody writes to."""
    if target.suffix.lower() != ".safetensors":
        raise TurboError(
            f"{target} does not end in .safetensors. Expected a .safetensors name: that is what is written."
        )
    check_free(target)


def check_target(target: Path, size: int) -> None:
    """Raise TurboError unless `size` bytes can go to `target`: see check_name, in an existing folder with room."""
    check_name(target)
    if not os.path.isdir(target.parent):
        raise TurboError(f"There is no folder {target.parent} to write {target.name} to. Create it first.")
    if os.path.isdir(target):
        raise TurboError(f"{target} is a folder. Expected the name of a file to write.")
    if target.exists():
        with _explained(target):
            os.rename(target, target)  # does nothing, and on Windows says now whether a program has the file open
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise TurboError(
            f"{target} needs {size / 2**30:.2f} GiB and the disk has {free / 2**30:.2f} GiB free. "
            "Free some room or write to another disk. Nothing was written."
        )


def file_header(layout: Layout, metadata: dict[str, str]):
    """(header bytes, {name: offset in the data}, size of the file)"""
    sizes = {name: torch.Size(shape).numel() * dtype.itemsize for name, (dtype, shape) in layout.items()}
    # Tensors are used where they lie in the mapped file, and matrix products round by alignment on a CPU: whole cache
    # lines first, which keeps them all aligned, then the rest, widest dtype first as safetensors itself does.
    order = sorted(layout, key=lambda name: (sizes[name] % _ALIGNMENT > 0, -layout[name][0].itemsize, name))
    entries, places, offset = {"__metadata__": metadata}, {}, 0
    for name in order:
        dtype, shape = layout[name]
        places[name] = offset
        end = offset + sizes[name]
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, places, 8 + len(text) + offset


def _put(file, tensor):
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    file.write(memoryview(data))


@contextmanager
def _explained(target: Path):
    """An error of the system as one that says what to do."""
    try:
        yield
    except OSError as error:
        cure = {
            errno.ENOSPC: "The disk is full: free some room or write to another disk.",
            errno.EACCES: _IN_USE,
            errno.EPERM: _IN_USE,
            errno.EINVAL: _IN_USE,  # Windows' error 1224, of a file that is mapped
            errno.EROFS: "That disk is read-only: write to another one.",
        }.get(error.errno, "Check the disk, or write to another one.")
        raise TurboError(
            f"{target} could not be written ({error.strerror or error}). {cure} Nothing is left over."
        ) from error
