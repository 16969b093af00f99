"""How much memory this process and its device have taken at most, how much there is, and keeping it."""

import ctypes
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


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


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones; does nothing elsewhere.

    Otherwise each large tensor goes back to the system, which clears its pages again: a fifth to a half of the time of
    training on a CPU. The price: the process never shrinks.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # a C library without it
        return
    mallopt(_M_TRIM_THRESHOLD, -1)  # never
    mallopt(_M_MMAP_MAX, 0)


def available_memory() -> tuple[int, int] | None:
    """(available, total) bytes of main memory, or None where the system does not tell."""
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
