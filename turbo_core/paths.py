"""Which path a computation takes: a Triton kernel where it can run and has proved itself right, torch everywhere else.

A kernel family is tried once per device against its torch twin before its first result is used (turbo_core.probe), so
that a compiler, driver or card that gets it wrong costs speed and one log line, never a video. What a probe cannot
survive is a kernel that reads or writes where it must not: CUDA then refuses everything else in this process.
"""

import contextlib
import contextvars
import functools
import importlib.util
import logging
import os

import torch

from .errors import TurboError

FAMILIES = ("quantize", "norm", "int8_mm", "sla")
SWITCH = "TURBOWAN_KERNELS"  # environment: "torch" turns the kernels off
_found = {}  # (device, family): why not, or None
_logged = set()
_probing = contextvars.ContextVar("_probing", default=frozenset())  # (device, family) that are being tried
_without = contextvars.ContextVar("_without", default=False)


def use_triton(device, family: str) -> bool:
    """True where the kernels of this family compute on this device."""
    return why_not(device, family) is None


# what torch.compiler.assume_constant_result sets, which imports all of the compiler: asked while tracing, a probe runs
use_triton._dynamo_marked_constant = True


def why_not(device, family: str) -> str | None:
    """Why the kernels of this family are not used on this device, in a few words; None where they are."""
    assert family in FAMILIES, family
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if _without.get():
        return "switched off for a comparison"
    return _cannot_run(device) or _has_failed(device, family)


@contextlib.contextmanager
def without_kernels():
    """Inside, torch computes everything: the twins that a probe or a benchmark compares with."""
    before = _without.set(True)
    try:
        yield
    finally:
        _without.reset(before)


@functools.cache
def _cannot_run(device):
    if os.environ.get(SWITCH, "") == "torch":
        return f"turned off by {SWITCH}=torch"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None if _has_triton() else "Triton is not installed"
    if device.type != "cuda":
        return f"no Triton kernels on {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the card is older than compute capability 8.0"
    if not _has_triton():
        return "Triton is not installed (on Windows: pip install triton-windows)"
    return None


def _has_triton():
    return importlib.util.find_spec("triton") is not None


def _needs_probe(device):
    return device.type != "cpu"  # the interpreter is there to be tested


def _has_failed(device, family):
    key = (device, family)
    if not _needs_probe(device) or key in _probing.get():
        return None
    if key not in _found:
        reason = _try(device, family)
        if reason and key not in _logged:
            _logged.add(key)
            logging.warning(
                "TurboWan: %s kernels are not used on %s: %s. PyTorch computes instead, slower.", family, device, reason
            )
        if reason == _NO_MEMORY:
            return reason  # not remembered: the next video may find more
        _found[key] = reason
    return _found[key]


_NO_MEMORY = "the card has no memory left to try them"


def _try(device, family):
    from .probe import PROBES

    before = _probing.set(_probing.get() | {(device, family)})
    try:
        return PROBES[family](device)
    except torch.OutOfMemoryError:
        return _NO_MEMORY
    except Exception as error:  # whatever a compiler or driver raises: the torch path is always there
        if not _answers(device):
            raise TurboError(
                f"A {family} kernel broke the connection to {device}, and nothing runs there until a restart. "
                f"Restart with the environment variable {SWITCH}=torch, and report this with your card and driver."
            ) from error
        first_line = (str(error).splitlines() or [""])[0]
        return f"the kernel failed ({type(error).__name__}: {first_line})"
    finally:
        _probing.reset(before)


def _answers(device) -> bool:
    """False once an illegal access has made CUDA refuse this process."""
    try:
        return torch.ones(1, device=device).item() == 1
    except RuntimeError:
        return False
