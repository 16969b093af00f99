"""Opening a checkpoint once: saying what it is, and reading its weights."""

from typing import NamedTuple

import torch

from ..disk import Disk
from ..errors import TurboError, shown
from .describe import Description, describe
from .formats import STATED, check_scale_values, decode
from .names import canonical, is_helper, is_scale
from .others.comfyui import is_attention
from .others.sharded import open_checkpoint

WORLD = "turbowan.world"  # in the metadata: the one world that a model was trained on, as tinywan.world.WORLD
FILE_VERSION = "1"  # of what converting writes, in the metadata as turbowan.version


class Opened(NamedTuple):
    """A checkpoint that is known to be whole. Its tensors lie in the mapped file until the last of them is let go."""

    tensors: dict[str, torch.Tensor]  # as stored, under official names
    description: Description
    disk: Disk  # reads them without touching the mapping


def inspect(path) -> Description:
    """Say what a checkpoint is and whether it is whole, without reading its weights: 28 GB take no longer than 28 MB.

    path: a .pth or .safetensors file, the .safetensors.index.json of several, or a folder in Diffusers' layout. A
    format that is not read here (nvfp4, int8 with convrot ...) is named in the description, see `foreign`. Raises
    TurboError (a ValueError) when the file is missing, damaged, refused, incomplete or of another family.
    """
    return _open(path, contents=False).description


def load(path, device="cpu", mapped: bool | None = None) -> tuple[dict[str, torch.Tensor], Description]:
    """(state dict under official names, description).

    Tensors are read, and may be written to (the file keeps its bytes). mapped: those on the CPU stay in the mapped file
    and are read when touched, by default where the free memory does not hold them. int8 stays int8; fp8 becomes bf16,
    since nothing here computes in it. Keys of Wan variants (VACE, the image branch ...) are passed through; what
    modules ask ComfyUI for is in the description, see `attention`. Raises TurboError like inspect, for formats that are
    not read here, and when a scale is not finite.
    """
    file = opened(path, writable=True)
    if mapped is None:
        mapped = torch.device(device).type == "cpu" and file.disk.stays_mapped(file.tensors.values())
    return weights(file, device, mapped), file.description


def opened(path, writable: bool = False) -> Opened:
    """Open and validate a checkpoint whose weights are wanted later, see weights. Raises TurboError like load.

    writable: may what lies in the mapped file, and with it a model on the CPU, be written to? See read.open_tensors.
    """
    file = _open(path, writable)
    check_read(file.description)
    return file


def _open(path, writable: bool = False, contents: bool = True) -> Opened:
    file = open_checkpoint(path, writable, contents)
    version = file.metadata.get("turbowan.version", FILE_VERSION)
    if version != FILE_VERSION:
        raise TurboError(
            f"{path} is of version {shown(version)!r}. Expected {FILE_VERSION!r}: update this pack to read it."
        )
    tensors, notes = canonical(file.tensors, path)
    notes = [*file.notes, *notes]
    described = describe(path, file.container, file.metadata, file.tensors, tensors, notes)
    return Opened(tensors, described, file.disk)


def check_read(found: Description) -> None:
    """Raise TurboError where a file has layers in formats that are not read here."""
    if not found.foreign:
        return
    name, kind = next(iter(found.foreign.items()))
    cure = "use the bf16 version of this model"
    if found.has_sla:
        cure = "use the published file of this model, or `turbo-core convert --format int8_block` on its bf16 version"
    elif found.comfyui:
        cure += ", or load it in ComfyUI, whose own loader Turbo Loader hands it to"
    raise TurboError(
        f"{found.path}: {shown(name)} is quantized as {kind!r}, which is not read here. "
        f"Expected {', '.join(STATED)}: {cure}."
    )


def weights(file: Opened, device="cpu", mapped: bool = False) -> dict[str, torch.Tensor]:
    """The state dict that load gives of an opened checkpoint. mapped: on the CPU, what needs no change is not read.

    Raises TurboError when a scale is not finite, and where the file is cut short meanwhile.
    """
    result, read = {}, file.disk.read
    for name, tensor in file.tensors.items():
        if is_helper(name) or is_attention(name):
            continue
        if is_scale(name, file.tensors):
            if file.tensors[name.removesuffix("_scale")].dtype != torch.int8:
                continue
            tensor = read(tensor)
            check_scale_values(name, tensor, file.description.path)
            tensor = tensor.float().contiguous()
        elif tensor.is_floating_point() and tensor.dtype.itemsize == 1:
            scale = file.tensors.get(f"{name}_scale")
            if scale is not None:
                scale = read(scale)
                check_scale_values(f"{name}_scale", scale, file.description.path)
            tensor = decode(read(tensor, again=True), scale)
        elif not mapped:
            tensor = read(tensor)
        result[name] = tensor.to(device)
    return result
