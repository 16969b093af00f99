"""Which path a computation takes: a Triton kernel where it can run and has proved itself right, torch everywhere else.

A kernel family is tried once per device against its torch twin before its first result is used (turbo_core.probe), so
that a compiler, driver or card that gets it wrong costs speed and one log line, never a video.
"""

import functools
import importlib.util
import logging
import os

import torch

FAMILIES = ("quantize", "norm", "int8_mm", "sla")
SWITCH = "TURBOWAN_KERNELS"  # environment: "torch" turns the kernels off
_probing = set()


def use_triton(device, family: str) -> bool:
    """True where the kernels of this family compute on this device."""
    device = torch.device(device)
    return (device.type, device.index, family) in _probing or why_not(device, family) is None


def why_not(device, family: str) -> str | None:
    """Why the kernels of this family are not used on this device, in a few words; None where they are."""
    assert family in FAMILIES, family
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _cannot_run(device) or _probe(device, family)


@functools.cache
def _cannot_run(device):
    if os.environ.get(SWITCH, "") == "torch":
        return f"turned off by {SWITCH}=torch"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None if _has_triton() else "Triton is not installed"
    if device.type != "cuda":
        return f"there are no kernels for {device.type}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "the card is older than compute capability 8.0"
    if not _has_triton():
        return "Triton is not installed (on Windows: pip install triton-windows)"
    return None


def _has_triton():
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _probe(device, family):
    if device.type == "cpu":
        return None  # the interpreter is there to be tested
    from .probe import PROBES

    key = (device.type, device.index, family)
    _probing.add(key)
    try:
        reason = PROBES[family](device)
    except Exception as error:  # whatever a compiler or driver raises: the torch path is always there
        reason = f"the kernel failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    finally:
        _probing.discard(key)
    if reason:
        logging.warning(
            "TurboWan: %s kernels are not used on %s: %s. PyTorch computes instead, slower.", family, device, reason
        )
    return reason
