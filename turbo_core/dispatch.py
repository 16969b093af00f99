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
import math
import os
import sys
import threading
import time

import torch

from .errors import TurboError

FAMILIES = ("quantize", "norm", "int8_mm", "sla")
SWITCH = "TURBOWAN_KERNELS"  # environment: "torch" turns the kernels off
# AMD's chips with matrix instructions for int8; on RDNA 1 and 2, which have none, such a product hangs the card
AMD_CHIPS = ("gfx908", "gfx90a", "gfx940", "gfx941", "gfx942", "gfx950")
AMD_FAMILIES = ("gfx11", "gfx12")
RETRY = 60  # seconds after which a card that was full is tried again
_found = {}  # (device, family): (why not, or None; until when by time.monotonic())
_logged = set()
_lock = threading.RLock()  # one probe at a time: a worker and a node may both come first
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
    if torch.version.hip is not None:
        chip = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        if chip not in AMD_CHIPS and not chip.startswith(AMD_FAMILIES):
            return f"an AMD {chip} has no matrix instructions for int8"
    elif torch.cuda.get_device_capability(device) < (8, 0):
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
    if not _is_known(key):
        if _is_capturing(device):
            return "a CUDA graph is being captured, in which nothing can be tried"  # not remembered
        with _lock:
            if not _is_known(key):
                _found[key] = _tried(device, family)
    return _found[key][0]


def _is_known(key):
    return key in _found and time.monotonic() < _found[key][1]


def _is_capturing(device):
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _tried(device, family):
    """(why the kernels fail, or None; until when that holds), after a probe."""
    if "first" not in _logged:
        _logged.add("first")
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else device
        once = "once per Triton version; this takes a while the first time"
        logging.info("TurboWan: compiling and testing kernels for %s, %s.", card, once)
    reason = _try(device, family)
    if reason and (device, family) not in _logged:
        _logged.add((device, family))
        logging.warning(
            "TurboWan: %s kernels are not used on %s: %s. PyTorch computes instead, slower.", family, device, reason
        )
    return reason, time.monotonic() + RETRY if reason == _NO_MEMORY else math.inf


_NO_MEMORY = "the card has no memory left to try them"


def _try(device, family):
    from .selfcheck import PROBES

    before = _probing.set(_probing.get() | {(device, family)})
    try:
        return PROBES[family](device)
    except Exception as error:  # whatever a compiler or driver raises: the torch path is always there
        if _out_of_memory(error):
            return _NO_MEMORY
        if not answers(device):
            raise TurboError(
                f"A {family} kernel broke the connection to {device}, and nothing runs there until a restart. "
                f"Restart with the environment variable {SWITCH}=torch, and report this with your card and driver."
            ) from error
        first_line = (str(error).splitlines() or [""])[0]
        return f"the kernel failed ({type(error).__name__}: {first_line})"
    finally:
        _probing.reset(before)


def _out_of_memory(error) -> bool:
    """True also where Triton or the driver says so, in a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def answers(device) -> bool:
    """False once an illegal access has made CUDA refuse this process; a full card answers."""
    try:
        return torch.ones(1, device=device).item() == 1
    except RuntimeError as error:
        return _out_of_memory(error)


FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # what kernels compute in


def learning(*tensors) -> bool:
    """True where a gradient is to flow through one of the tensors, or None: kernels have none."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def explained(function):
    """The function, a kernel's failure to compile or to start told as a TurboError that names the cure."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except _launch_error() as error:
            raise TurboError(
                f"{error}. Cure: set the environment variable TURBOWAN_KERNELS=torch, then PyTorch "
                "computes instead, slower; and report this with your card and driver."
            ) from error

    return run


def _launch_error():
    """kernels.launch.LaunchError, without importing Triton for it: nothing can have failed before."""
    launch = sys.modules.get(f"{__package__}.kernels.launch")
    return () if launch is None else launch.LaunchError
