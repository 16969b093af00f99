"""Who computes the norms of a VAE."""

import torch

from ..dispatch import use_triton
from . import reference


def operations(device):
    """Where the operations that compute on this device are found, under the names of reference.py: fast where the
    kernel computes. While torch.compile traces it is reference: the compiler joins these operations by itself."""
    if torch.compiler.is_compiling() or not use_triton(device, "vae"):
        return reference
    from . import fast

    return fast
