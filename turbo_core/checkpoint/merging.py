"""Carrying an acceleration over to a finetune: finetune + strength * (accelerated - original), tensor by tensor."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import TurboError, quoted, shown
from ..files import state_of
from .converting import Progress, file_metadata
from .describe import Description, describe, stored_formats
from .encode import on_disk, plan, while_unchanged, written_as
from .formats import FLOATS, FORMATS, check_finite, decode
from .loading import WORLD, opened
from .names import PROJ_L, is_delicate, is_helper, is_scale
from .others.comfyui import is_attention
from .others.sharded import files_of
from .write import check_name, check_target, stream_safetensors

_SLAB = 64  # rows added at once: bounds the float64 copies, and keeps them in the cache
_SIZES = ("dim", "ffn_dim", "num_layers", "in_dim", "out_dim", "text_dim", "head_dim")
_UNRELATED = 0.5  # distance from the original, relative to it; two unrelated models are 1.4 apart


class Merged(NamedTuple):
    """A finished merge. distances: {path: norm of its difference from the original, relative to the original's};
    warnings: what the reader of the new file should know, in sentences."""

    path: str
    bytes: int
    distances: dict[str, float]
    warnings: list[str]


def merge(
    finetune,
    base,
    turbo: Sequence,
    target,
    format: str = "bf16",
    strength: float | Sequence[float] = 1.0,
    progress: Progress | None = None,
) -> Merged:
    """Write finetune + sum of strength * (turbo - base) as safetensors, in any format that convert writes.

    base: the original that the finetune and every file in `turbo` were trained from. Accelerated files may bring SLA,
    rCM or both; rCM-only weights plus SLA are finetune = rCM, turbo = [SLA]. strength: one for all, or one each.
    A tensor that all files have follows the formula, in float64, with a single rounding at the end; one that only the
    finetune has (the branches of VACE or image-to-video) is kept; proj_l, which the original lacks, is taken whole
    from the file that has it, whatever the strength.
    One tensor is in memory at a time; the file is written aside and renamed; progress counts the bytes written.
    Raises TurboError when files are of different sizes or families, when base or turbo is quantized (their rounding
    would be larger than what is carried over), when two files bring a proj_l, and like convert. A quantized finetune
    is decoded, with a warning.
    """
    finetune, base, target = Path(finetune), Path(base), Path(target)
    turbo = [Path(path) for path in turbo]
    strengths = _strengths(strength, len(turbo), format)
    check_name(target)
    for path in (finetune, base, *turbo):
        if os.path.exists(target) and any(
            os.path.exists(part) and os.path.samefile(part, target) for part in files_of(path)
        ):
            raise TurboError(f"{target} is one of the files to merge. Expected another name for the result.")
    parts = [part for path in dict.fromkeys((finetune, base, *turbo)) for part in files_of(path)]
    states = {part: state_of(part) for part in parts if os.path.isfile(part)}
    files = {path: opened(path) for path in dict.fromkeys((finetune, base, *turbo))}
    _check_sizes({path: file.description for path, file in files.items()}, finetune)
    own, tensors = files[finetune].description, {path: file.tensors for path, file in files.items()}
    disks = {path: file.disk for path, file in files.items()}
    for path in (base, *turbo):
        _check_exact(tensors[path], path)
    rounded = sorted({kind for kind in stored_formats(tensors[finetune], finetune).values() if kind not in FLOATS})
    sources = _sources(tensors, finetune, base, turbo)
    hollow = _hollow(tensors, finetune, sources)
    description = _describe(own, hollow)
    planned = plan(hollow, stored_formats(hollow, finetune), format)
    places = on_disk(planned, hollow)
    size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in places.values())
    check_target(target, size)
    recipe = {"finetune": finetune.name, "base": base.name, "turbo": [[p.name, s] for p, s in zip(turbo, strengths)]}
    metadata = file_metadata(description, format) | {"turbowan.merged": json.dumps(recipe)}
    distance = _Distance([finetune, *turbo])
    output = _merged(tensors, disks, planned, sources, (finetune, base, *turbo), strengths, distance)
    output = while_unchanged(_counted(output, size, progress), states)
    total = stream_safetensors(target, places, output, metadata)
    warnings = _warnings(finetune, base, rounded, distance)
    if description.has_sla and format != "int8_block":
        warnings.append("Load it with Turbo Loader: stock ComfyUI loaders drop proj_l, which makes it another model.")
    return Merged(str(target), total, {str(path): apart for path, apart in distance}, warnings)


def _strengths(strength, count: int, format: str) -> list[float]:
    if format not in FORMATS:
        raise TurboError(f"Unknown format {quoted(format)}. Expected one of {', '.join(FORMATS)}.")
    if count == 0:
        raise TurboError("Nothing to merge: name at least one accelerated model (TurboWan, SLA or rCM weights).")
    strengths = [strength] * count if isinstance(strength, (int, float)) else list(strength)
    if len(strengths) == 1:
        strengths *= count
    if len(strengths) != count or not all(math.isfinite(s) for s in strengths):
        raise TurboError(f"{count} models are merged, got the strengths {strengths}. Expected one for all or one each.")
    return [float(s) for s in strengths]


def _check_sizes(described: dict[Path, Description], finetune: Path) -> None:
    ours = described[finetune]
    for path, theirs in described.items():
        wrong = [name for name in _SIZES if getattr(ours, name) != getattr(theirs, name)]
        if wrong:
            facts = ", ".join(f"{name} {getattr(ours, name)} / {getattr(theirs, name)}" for name in wrong)
            raise TurboError(
                f"{finetune.name} ({ours.family}) and {path.name} ({theirs.family}) are of different sizes ({facts}). "
                "Expected models trained from the same original: choose the files of one family."
            )


def check_related(finetune: Description, base: Description, turbo: Sequence[Description]) -> None:
    """Raise TurboError where the descriptions of files tell already that merge will not take them."""
    _check_sizes({Path(file.path): file for file in (finetune, base, *turbo)}, Path(finetune.path))
    for file in (base, *turbo):
        if file.format not in (*FLOATS, "mixed"):
            raise _rounded(file.path, f"its format is {file.format}")


def _check_exact(tensors: dict, path: Path) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype == torch.int8 or (tensor.is_floating_point() and tensor.dtype.itemsize == 1):
            raise _rounded(path, f"{shown(name)} is {tensor.dtype}")


def _rounded(path, how: str) -> TurboError:
    return TurboError(
        f"{path} is quantized ({how}). Expected bf16, fp16 or fp32: rounded to 8 bits, the difference between two "
        "models is mostly rounding. Take the unquantized file (without -quant)."
    )


def _sources(files: dict[Path, dict], finetune: Path, base: Path, turbo: list[Path]) -> dict[str, Path | None]:
    """{name: None where the formula holds, else the only file that the tensor is copied from}."""
    result = {}
    for path, tensors in files.items():
        if path == base:
            continue
        for name in tensors:
            if is_helper(name) or is_scale(name, tensors):
                continue
            if is_attention(name):  # no weight: the finetune's own
                result |= {name: finetune} if path == finetune else {}
                continue
            lacking = [other for other in (finetune, base, *turbo) if name not in files[other]]
            if not lacking:
                _check_alike(files, name)
                result[name] = None
            elif path == finetune and PROJ_L not in name:
                result[name] = finetune
            elif PROJ_L in name and base in lacking and name not in result:
                result[name] = path
            elif PROJ_L in name and base in lacking:
                raise TurboError(
                    f"{result[name].name} and {path.name} both bring proj_l, the trained half of sparse-linear "
                    f"attention, and {base.name} has none to compare them with. Only one may: use the finetune of a "
                    "stock Wan model, or the accelerated model it was trained from as the base."
                )
            else:
                raise TurboError(
                    f"{shown(name)} of {path.name} is missing in {lacking[0].name}: they are of different families. "
                    "Expected accelerated models of the finetune's original."
                )
    return result


def _check_alike(files: dict[Path, dict], name: str) -> None:
    """Raise TurboError unless a tensor that all files have, of a branch perhaps, has one shape in them."""
    shapes = {path: tuple(tensors[name].shape) for path, tensors in files.items()}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{list(shape)} in {path.name}" for path, shape in shapes.items())
        raise TurboError(f"{shown(name)} is {found}. Expected models trained from the same original.")


def _hollow(files, finetune, sources) -> dict[str, torch.Tensor]:
    """The merged model without data: what decides how each tensor is stored."""
    result = {}
    for name, only in sources.items():
        tensor = files[only or finetune][name]
        narrow = tensor.dtype.itemsize == 1 and _is_decoded(files[only or finetune], name)
        dtype = torch.bfloat16 if narrow else tensor.dtype
        if only is None and is_delicate(name):  # as wide as the widest file has it
            for tensors in files.values():
                dtype = torch.promote_types(dtype, tensors[name].dtype) if tensors[name].dtype.itemsize > 1 else dtype
        result[name] = torch.empty(tensor.shape, dtype=dtype, device="meta")
    return result


def _is_decoded(tensors: dict, name: str) -> bool:
    """True for what becomes floats: floats, and integers with a scale; others are carried along."""
    return not is_attention(name) and (tensors[name].is_floating_point() or f"{name}_scale" in tensors)


def _describe(finetune: Description, hollow: dict) -> Description:
    kept = {name: finetune.metadata[name] for name in ("config", WORLD) if name in finetune.metadata}
    return describe(finetune.path, "safetensors", kept, hollow, hollow)


def _counted(output, size: int, progress: Progress | None):
    written = 0
    for name, tensor in output:
        yield name, tensor
        written += tensor.nbytes
        if progress is not None:
            progress(written, size)


def _merged(files, disks, planned, sources, paths, strengths, distance):
    """Yield (name on disk, tensor) of the merged model. files: {path: tensors}; disks: {path: what reads them}; paths:
    finetune, base, turbo ..."""

    def read(path, name):
        return disks[path].read(files[path][name]) if name in files[path] else None

    for name, kind in planned.items():
        only = sources[name]
        path = only or paths[0]
        tensor = read(path, name)
        if _is_decoded(files[path], name):
            tensor = decode(tensor, read(path, f"{name}_scale"), _decoded(tensor.dtype))
        if only is None and tensor.is_floating_point():
            inputs = [tensor, *(read(other, name) for other in paths[1:])]
            tensor = _add(inputs, strengths, distance)
            if not tensor.isfinite().all():
                for other, given in zip(paths, inputs):
                    check_finite(name, given, other)
        # any float format: as told, the tensor is yet to be quantized
        yield from written_as(kind, name, tensor, None, "fp32", path).items()
        inputs = tensor = None  # before the next ones come


def _decoded(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize > 1 else torch.float32


def _add(inputs, strengths, distance) -> torch.Tensor:
    """inputs: finetune, base, turbo ... of one tensor. Returns finetune + sum of strength * (turbo - base), float32."""
    shape = inputs[0].shape
    rows = shape[0] if len(shape) > 1 else 1
    parts = []
    for slabs in zip(*(tensor.reshape(rows, -1).split(_SLAB) for tensor in inputs)):
        result, original, *others = (slab.double() for slab in slabs)
        distance.add(0, result - original, original)
        for index, (other, strength) in enumerate(zip(others, strengths)):
            delta = other - original
            distance.add(index + 1, delta, original)
            result.add_(delta, alpha=strength)
        parts.append(result.float())
    return torch.cat(parts).reshape(shape)


class _Distance:
    """Norms of what separates each file from the original, relative to the original's."""

    def __init__(self, paths):
        self.paths = paths
        self.squares = [[0.0, 0.0] for _ in paths]

    def add(self, index, delta, original):
        for place, tensor in enumerate((delta, original)):
            self.squares[index][place] += tensor.square().sum().item()

    def __iter__(self):
        for path, (delta, original) in zip(self.paths, self.squares):
            yield path, math.sqrt(delta / original) if original else math.inf


def _warnings(finetune: Path, base: Path, rounded: list[str], distance) -> list[str]:
    result = []
    if rounded:
        result.append(f"{finetune.name} is quantized ({', '.join(rounded)}): what it lost in rounding stays lost.")
    for path, apart in distance:
        if apart > _UNRELATED:
            result.append(
                f"{path.name} is so far from {base.name} that it hardly was trained from it: check that all files "
                "are of one family and, of an A14B pair, of the same expert."
            )
        elif apart == 0 and path != finetune:
            result.append(f"{path.name} holds the same weights as {base.name}: they add nothing.")
    return result
