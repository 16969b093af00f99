"""How many latent frames go through the VAE together, by the memory there is."""

import math

import torch

from ..devices import available_memory

MOST_FRAMES = 4  # of latents in one piece: more was no faster
# Tensors of a pixel and a channel of base width: what the layers keep of the pieces before, and for each latent frame
# the largest that are alive together. Counted at the published width, which tests/pipeline/test_plan.py does again.
_TENSORS = {"decode": (27.5, 12.0), "encode": (17.5, 12.2), "tiny decode": (3.5, 9.5)}
_ENOUGH = {"cpu": 2**28}  # bytes: larger pieces were no faster there
_COUNTED = 2**31  # numbers of a tensor beyond which cuDNN before 9.3 has no convolution, and torch's own is slow
_SHARE = 0.7  # of free memory: allocators leave gaps, libraries take workspaces


def piece_bytes(work: str, pixels: int, frames: int, dim: int, dtype: torch.dtype) -> int:
    """What pieces of so many latent frames need at worst, weights and video apart. work: "decode", "encode" or "tiny
    decode"."""
    kept, alive = _TENSORS[work]
    return int(pixels * dim * dtype.itemsize * (kept + alive * frames))


def frames_of_a_piece(work: str, pixels: int, dim: int, dtype: torch.dtype, device, free: int | None = None) -> int:
    """Latent frames that fit and are of use: 1 to MOST_FRAMES. free: bytes, by default what the device has."""
    device = torch.device(device)
    free = free_memory(device) if free is None else free
    room = min(math.inf if free is None else _SHARE * free, _ENOUGH.get(device.type, math.inf))
    fitting = [
        n
        for n in range(1, MOST_FRAMES + 1)
        if piece_bytes(work, pixels, n, dim, dtype) <= room and dim * (4 * n + 2) * pixels < _COUNTED
    ]
    return max(fitting, default=1)


def fits(work: str, pixels: int, dim: int, dtype: torch.dtype, device) -> bool:
    """False where not even one latent frame fits main memory: its system ends a process that takes too much, or another
    one, and tells nobody. A full card says so itself, of what it really takes."""
    device = torch.device(device)
    if device.type == "cuda":
        return True
    free = free_memory(device)
    return free is None or piece_bytes(work, pixels, 1, dim, dtype) <= _SHARE * free


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on a device, None where it does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    known = available_memory()
    return known and known[0]
