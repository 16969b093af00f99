"""Which code computes on a device: Triton kernels where they were proved right, torch everywhere else.

turbo_core.selfcheck.prove(device) holds each family of kernels to its torch reference, once, when a model is loaded,
and records here what it found; operations only read the verdict. So a compiler, driver or card that gets a kernel wrong
costs speed and one log line, never a video. Where nobody asked for the proof, torch computes.
"""

import functools
import importlib.util
import inspect
import logging
import os
import re
import sys

import torch

from .errors import TurboError

# namespace of torch's operators: two copies of this pack in one process each ask their own verdicts
OPERATORS = "turbowan" if __package__ == "turbo_core" else f"turbowan_{re.sub('[^0-9A-Za-z]', '_', __package__)}"
FAMILIES = ("quantize", "norm", "int8_mm", "sla", "vae")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # what kernels compute in
SWITCH = "TURBOWAN_KERNELS"  # environment: "torch" turns the kernels off, "triton" takes them without proof
# AMD's chips with matrix instructions for int8; on RDNA 1 and 2, which have none, such a product hangs the card
AMD_CHIPS = ("gfx908", "gfx90a", "gfx940", "gfx941", "gfx942", "gfx950")
AMD_FAMILIES = ("gfx11", "gfx12")
UNPROVED = "nobody has proved them here: Turbo Doctor in ComfyUI, or turbo_core.selfcheck.prove(device), does"
_verdicts = {}  # (device, family): None where the kernels compute, else why not


def use_triton(device: torch.device, family: str) -> bool:
    """True where the kernels of this family compute on this device, which is that of a tensor."""
    verdict = _verdicts.get((device, family), UNPROVED)
    if verdict is UNPROVED and device.type == "cuda" and not torch.compiler.is_compiling():
        return _unproved(device)
    return verdict is None


def why_not(device, family: str) -> str | None:
    """Why the kernels of this family are not used on this device, in a few words; None where they are."""
    assert family in FAMILIES, family
    device = whole_name(device)
    return _verdicts[device, family] if (device, family) in _verdicts else cannot_run(device) or UNPROVED


def record(device, family: str, reason: str | None) -> None:
    """Note the verdict on a family of kernels on a device: None where they compute from now on, else why not."""
    assert family in FAMILIES, family
    _verdicts[whole_name(device), family] = reason


def is_decided(device, family: str) -> bool:
    """True where a verdict was recorded, for or against the kernels."""
    return (whole_name(device), family) in _verdicts


def whole_name(device) -> torch.device:
    """The device as tensors name it, with its number."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


@functools.cache
def cannot_run(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on this device at all, in a few words; None where they can."""
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


def asked_for() -> bool:
    """True where the environment says to take the kernels without proof."""
    return os.environ.get(SWITCH, "") == "triton"


def trust(device) -> None:
    """Let every family that can run on the device compute there, proved or not."""
    for family in FAMILIES:
        record(device, family, cannot_run(whole_name(device)))


def _unproved(device) -> bool:
    """What an operation does on a card that nobody has proved the kernels for; says so once."""
    if asked_for():
        trust(device)
        return cannot_run(device) is None
    _tell_unproved(device)
    return False


@functools.cache
def _tell_unproved(device):
    if cannot_run(device) is None:
        logging.warning("TurboWan: kernels are not used on %s, PyTorch computes instead, slower: %s.", device, UNPROVED)


if os.environ.get("TRITON_INTERPRET") == "1":
    trust("cpu")  # the interpreter is there to be tested


def register_operator(name: str, run, schema: str, empty, reads_back: bool = False) -> None:
    """Make run torch's operator OPERATORS::name, one node for torch.compile.

    empty: the same arguments -> results of the right shapes and dtypes, nothing computed. reads_back: it may wait for a
    number of the device, which no CUDA graph records.
    """

    def explaining(*given):
        with explained():
            return run(*given)

    options = {"mutates_args": (), "schema": schema}
    if reads_back and "tags" in inspect.signature(torch.library.custom_op).parameters:
        options["tags"] = tuple(filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)]))
    torch.library.custom_op(f"{OPERATORS}::{name}", explaining, **options).register_fake(empty)


def learning(*tensors) -> bool:
    """True where a gradient is to flow through one of the tensors, or None: kernels have none."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class explained:
    """A context in which a kernel's failure to compile or to start is told as a TurboError that names the cure."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        # kernels.launch.LaunchError, without importing Triton for it: nothing can have failed before
        launch = sys.modules.get(f"{__package__}.kernels.launch")
        if launch is not None and isinstance(error, launch.LaunchError):
            raise TurboError(
                f"{error}. Cure: set the environment variable {SWITCH}=torch, then PyTorch computes instead, slower; "
                "and report this with your card and driver."
            ) from error
