"""Saying what a checkpoint is, and reading it."""

import torch

from ..errors import TurboError
from .describe import Description, describe
from .formats import check_finite, decode
from .names import canonical, is_helper, is_scale
from .read import open_tensors

WORLD = "turbowan.world"  # in the metadata: the one world that a model was trained on, "tinywan" is that of train.clips
FILE_VERSION = "1"  # of the convention above, in the metadata as turbowan.version


def inspect(path) -> Description:
    """Say what a checkpoint is and whether it is whole, without reading its weights: 28 GB take no longer than 28 MB.

    Raises TurboError (a ValueError) when the file is missing, damaged, refused, incomplete or of another family.
    """
    return _open(path)[1]


def load(path, device="cpu") -> tuple[dict[str, torch.Tensor], Description]:
    """(state dict under official names, description).

    Tensors on the CPU stay mapped to the file, are read when touched, and may be written to (the file keeps its bytes).
    int8 stays int8; fp8 becomes bf16, since
    nothing here computes in it. Keys of Wan variants (VACE, the image branch ...) are passed through.
    Raises TurboError like inspect, and when a scale is not finite.
    """
    tensors, description = _open(path, writable=True)
    result = {}
    for name, tensor in tensors.items():
        if is_helper(name):
            continue
        if is_scale(name, tensors):
            if tensors[name.removesuffix("_scale")].dtype != torch.int8:
                continue
            tensor = tensor.float().contiguous()
            check_finite(name, tensor, path)
        elif tensor.is_floating_point() and tensor.dtype.itemsize == 1:
            tensor = decode(tensor, tensors.get(f"{name}_scale"))
        result[name] = tensor.to(device)
    return result, description


def _open(path, writable: bool = False) -> tuple[dict[str, torch.Tensor], Description]:
    file = open_tensors(path, writable)
    version = file.metadata.get("turbowan.version", FILE_VERSION)
    if version != FILE_VERSION:
        raise TurboError(f"{path} is of version {version!r}. Expected {FILE_VERSION!r}: update this pack to read it.")
    tensors, notes = canonical(file.tensors, path)
    notes = [*file.notes, *notes]
    return tensors, describe(path, file.container, file.metadata, len(file.tensors), tensors, notes)
