"""Memory that a kernel was to write and did not, or wrote and was not to, made visible."""

import math
from contextlib import contextmanager
from unittest.mock import patch

import torch

_GUARD = 1 << 16  # bytes before and after each tensor: further than one tile of a small matrix reaches
_BYTE = 0x7F


def _shape(size):
    return tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else tuple(size)


@contextmanager
def poisoned():
    """torch.empty, empty_like and Tensor.new_empty return NaN (integers: bytes of 0x7F) between two guard zones.

    Only CPU tensors, without torch's fake mode. Fails at the end when a guard zone was written to.
    """
    shipped, guards = torch.empty, []

    def allocate(shape, dtype, device):
        plain = shipped(shape, dtype=dtype, device=device)
        if type(plain) is not torch.Tensor or plain.device.type != "cpu":
            return plain
        inner = math.prod(shape) * plain.element_size()
        raw = torch.full((inner + 2 * _GUARD,), _BYTE, dtype=torch.uint8, device="cpu")
        guards.append((raw, inner, tuple(shape)))
        out = raw[_GUARD : _GUARD + inner].view(plain.dtype).view(shape)
        return out.fill_(math.nan) if plain.is_floating_point() else out

    def empty(*size, dtype=None, device=None, memory_format=None, **_):
        shape, dtype = _shape(size), dtype or torch.get_default_dtype()
        if memory_format is torch.channels_last_3d:  # the kernel that reads a VAE's activations takes no other
            return allocate((shape[0], *shape[2:], shape[1]), dtype, device).permute(0, 4, 1, 2, 3)
        return allocate(shape, dtype, device)

    def empty_like(x, dtype=None, device=None, **_):
        return allocate(x.shape, dtype or x.dtype, device or x.device)

    def new_empty(x, *size, dtype=None, device=None, **_):
        return allocate(_shape(size), dtype or x.dtype, device or x.device)

    with patch.multiple(torch, empty=empty, empty_like=empty_like), patch.object(torch.Tensor, "new_empty", new_empty):
        yield
    for raw, inner, shape in guards:
        for side, zone in (("before", raw[:_GUARD]), ("after", raw[_GUARD + inner :])):
            stray = int((zone != _BYTE).sum())
            assert stray == 0, f"{stray} bytes written {side} a tensor of shape {list(shape)}"
