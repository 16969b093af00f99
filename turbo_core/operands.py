"""What the operations have to know of their operands before a kernel sees them."""

import functools
import sys

import torch

from .errors import TurboError

FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # what kernels compute in


def refuse(name, what, expected, got):
    raise TurboError(f"{name}: {what} must be {expected}, got {got}")


def check_device(name, what, t, device):
    """Raise TurboError unless t lies on x's device."""
    if t.device != device:
        refuse(name, what, f"on {device} as x is", f"on {t.device}")


def check_float(name, what, t, shape, device, dtype=None):
    """Raise TurboError unless t is a float tensor, or one of dtype, of this shape on x's device."""
    if not t.is_floating_point() or (dtype and t.dtype != dtype) or tuple(t.shape) != tuple(shape):
        refuse(name, what, f"{dtype or 'float'} {list(shape)}", f"{t.dtype} {list(t.shape)}")
    check_device(name, what, t, device)


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
