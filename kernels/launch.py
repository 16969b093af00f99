"""Launching a kernel: on the device of its operands, with one error for all that can go wrong."""

import contextlib
import contextvars
import functools

import torch
import triton


class LaunchError(RuntimeError):
    """A kernel that does not compile, or does not start: too large for the card, for one."""


@functools.cache
def processors(device) -> int:
    """Multiprocessors of a card; 3 elsewhere, so that the interpreter walks through several tiles in one program."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def run(kernel, grid, arguments, options):
    """Launch on the device of the first argument, which need not be the current one. Raises LaunchError."""
    if not grid[0]:
        return
    device = arguments[0].device
    try:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            if "SPECIALIZE" in options:  # its allocator is this call's own
                contextvars.copy_context().run(_launch_with_memory, kernel, grid, arguments, options)
            else:
                kernel[grid](*arguments, **options)
    except Exception as error:  # whatever a compiler or driver raises
        if "out of memory" in str(error):
            raise  # no fault of the kernel
        first_line = (str(error).splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {first_line}"
        raise LaunchError(f"{kernel.fn.__name__} cannot run on {device} ({reason})") from error


def _launch_with_memory(kernel, grid, arguments, options):
    """For kernels that make descriptors on the card, which need memory there."""
    device = arguments[0].device
    triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=device))
    kernel[grid](*arguments, **options)
