"""What a process does with the memory of freed tensors on a CPU."""

import ctypes
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory(device: torch.device) -> None:
    """Have glibc keep the memory of freed tensors for the next ones, where this device is a CPU.

    Otherwise each large tensor goes back to the system, which clears its pages again: a fifth to a half of the time of
    training on a CPU, a sixth of a Wan block in int8 with sparse attention. The price: the process never shrinks. For
    processes of our own; a host's memory is not ours to keep.
    """
    if device.type != "cpu" or sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # a C library without it
        return
    mallopt(_M_TRIM_THRESHOLD, -1)  # never
    mallopt(_M_MMAP_MAX, 0)
