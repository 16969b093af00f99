"""The device to compute on: which it is, what it can where torch does not tell before it fails, and its memory."""

import functools
import gc
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from .errors import TurboError, shown


def default_dtype(device) -> torch.dtype:
    """What a model is computed in on a device unless somebody says otherwise."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def pick_device(device=None) -> torch.device:
    """The torch device of this name, or the best one there is. Raises TurboError when it is not available."""
    if device is None:
        accelerator = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(accelerator)
    try:
        device = torch.device(device)
        torch.zeros(1, device=device).item()  # meta has tensors, and no numbers in them
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise TurboError(
            f"Device {device!s} cannot be used ({shown(reason, 120)}). Leave --device out, or use cpu."
        ) from error
    return device


def widest_float(device) -> torch.dtype:
    """float64, or float32 on Apple GPUs, which have nothing wider."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


@functools.cache
def has_int_mm(device: torch.device) -> bool:
    """True where torch._int_mm runs: CPUs and NVIDIA cards from Turing (compute capability 7.5) on."""
    if device.type != "cuda":
        return device.type == "cpu"
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (7, 5)


@functools.cache
def int_mm_pays(device: torch.device) -> bool:
    """False for x86 CPUs without products of int8 (VNNI, AMX), where torch._int_mm takes 14 times as long."""
    if device.type != "cpu":
        return True
    known = getattr(torch.cpu, "get_capabilities", dict)()
    # other architectures have other names, and older torch does not tell
    return "avx512_vnni" not in known or any(known.get(name) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what this thread gave it."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # another clip may be decoded beside
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def own_stream(device: torch.device):
    """On a card what is computed inside goes beside other work, and is done at the end; one at a time."""
    if device.type != "cuda":
        yield
        return
    stream = _stream_beside(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@functools.cache
def _stream_beside(device):
    """One for all: what was freed on a stream, the allocator gives to that stream alone."""
    return torch.cuda.Stream(device)


def page_locked(tensors: dict[str, torch.Tensor], read=None) -> dict[str, torch.Tensor] | None:
    """Copies in memory that stays where it is, which a card reads by itself; None where the system gives no more.

    read: brings a tensor from its file into memory.
    """
    found, room, left = {}, None, sum(_aligned(tensor.nbytes) for tensor in tensors.values())
    try:
        for name, tensor in tensors.items():
            tensor, size = tensor if read is None else read(tensor), _aligned(tensor.nbytes)
            if room is None or len(room) < size:
                room = torch.empty(max(size, min(_LOCKED, left)), dtype=torch.uint8, pin_memory=True)
            place, room, left = room[: tensor.nbytes], room[size:], left - size
            found[name] = place.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    except RuntimeError:
        return None
    return found


_LOCKED = 1 << 30  # bytes at a time: torch rounds each piece up to a power of two, 71 MB of a matrix to 134


def _aligned(size: int) -> int:
    return -(-size // 256) * 256


def release(device: torch.device) -> None:
    """Give back the memory of tensors that are gone."""
    gc.collect()
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


def reset_peak_memory(device: torch.device) -> None:
    """Start measuring the device's peak anew; the process's own peak cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes: "process" (resident, mapped files included; absent on Windows) and "device" (CUDA and ROCm)."""
    peak = {}
    try:
        import resource
    except ImportError:  # Windows
        pass
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak["process"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


class OutOfMemory(TurboError):
    """Memory ran out in the middle of the work."""


_FULL = "allocate memory", "out of memory", "unable to find an engine", "ALLOC_FAILED"


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out: a CPU's has no type of its own, Triton and the driver say so in a
    plain RuntimeError, and cuDNN finds no engine where none has room to work."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in str(error) for words in _FULL)


@contextmanager
def memory_told():
    """Memory that runs out inside, of a card or the machine, as the error that a person can mend."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"Out of memory ({first_line}). Use the -quant files, a smaller --size, fewer --frames or --tiled."
        ) from error


def available_memory() -> tuple[int, int] | None:
    """(available, total) bytes of main memory, or None where the system does not tell; of what a container or a
    cluster's job may use, where that is less than the machine has."""
    known = _of_machine()
    limited = _of_groups()
    return known if known is None or limited is None else tuple(map(min, zip(known, limited)))


def _of_machine():
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            lines = dict(line.split(":", 1) for line in file)
        return tuple(int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError):
        pass
    try:
        from psutil import virtual_memory
    except ImportError:
        return None
    memory = virtual_memory()
    return memory.available, memory.total


def _of_groups(process="/proc/self/cgroup", root="/sys/fs/cgroup"):
    """(available, total) bytes of the tightest of Linux's control groups that this process is in, None without one."""
    found = []
    with suppress(OSError, ValueError), open(process, encoding="utf-8") as file:
        for line in file:
            _, kinds, path = line.rstrip("\n").split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            # the second form has one tree for all kinds, a container sees its own group as the root of it
            base, *names = (Path(root, "memory"), *_FIRST) if kinds else (Path(root), *_SECOND)
            place = base / path.lstrip("/")
            for group in (place, *place.parents):
                if group.is_relative_to(base):
                    with suppress(OSError, ValueError):  # "max", or no such file
                        found.append(_of_group(group, *names))
    return min(found, default=None)


_FIRST = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
_SECOND = "memory.max", "memory.current", "inactive_file"


def _of_group(group, most, used, cached):
    limit = int((group / most).read_text("utf-8"))
    stat = dict(line.split() for line in (group / "memory.stat").read_text("utf-8").splitlines())
    # pages of files count as used until somebody needs the room
    return max(0, limit - int((group / used).read_text("utf-8")) + int(stat.get(cached, 0))), limit
