"""Any readable checkpoint rewritten as safetensors in another number format.

Reads the published .pth (quantized or not), safetensors, training dumps, stock Wan files in ComfyUI's naming, folders
and files in Diffusers' layout, and our own. In memory a checkpoint is a flat dictionary of official names, where a
quantized linear X is X.weight int8 [N, K] and X.weight_scale float32, [ceil(N/128), ceil(K/128)] in the block format
or [N, 1] in the row format; on disk X.comfy_quant says which.
"""

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ..errors import TurboError, quoted, shown
from ..files import state_of
from .describe import Description, stored_formats
from .encode import Plan, is_encoded_anew, on_disk, plan, rewritten, while_unchanged
from .formats import FLOATS, FORMATS, INTEGERS, QUANTIZED, transformer_config
from .loading import FILE_VERSION, WORLD, opened
from .others.sharded import files_of
from .read import stored_checksums
from .write import check_name, check_target, stream_safetensors

Progress = Callable[[int, int], None]  # (bytes done, bytes in total)
_CHUNK = 1 << 24  # bytes hashed at once


class Converted(NamedTuple):
    """A finished conversion. warnings: what the reader of the new file should know, in sentences."""

    path: str
    bytes: int
    warnings: list[str]


def convert(source, target, format: str, progress: Progress | None = None) -> Converted:
    """Write any readable checkpoint as safetensors in "int8_block", "int8_row", "bf16", "fp16", "fp32" or "fp8".

    The int8 formats and fp8 quantize the ten linears of each block and leave everything else as it is stored; fp8 is
    ComfyUI's own float8_e4m3fn with one scale per layer, which here is decoded when it is loaded. The float
    formats cast all weights and biases, but never narrow proj_l, norms and modulation: where the source has those in
    float32 (the published files have proj_l so), float32 they stay. A layer that already has the wanted format is
    copied bit for bit; quantizing a quantized layer again rounds twice and is told in the warnings.
    One tensor is in memory at a time. progress counts the bytes of the source (hashed first), then of the target.
    Raises TurboError for an unreadable source, an unwritable target, a NaN or infinite weight (by name); a failed or
    interrupted conversion leaves neither a part nor a changed target behind.
    """
    if format not in FORMATS:
        raise TurboError(f"Unknown format {quoted(format)}. Expected one of {', '.join(FORMATS)}.")
    return _rewrite(Path(source), Path(target), format, progress)


def quantize(source, target, format: str = "int8_block", progress: Progress | None = None) -> Converted:
    """Quantize the ten linears per block of a float checkpoint, "int8_block" or "int8_row"; see convert.

    Raises TurboError for a source that is quantized already: convert takes those.
    """
    if format not in INTEGERS:
        raise TurboError(
            f"Cannot quantize to {quoted(format)}. Expected {' or '.join(INTEGERS)}; convert writes floats."
        )
    return _rewrite(Path(source), Path(target), format, progress, floats_only=True)


def _rewrite(source: Path, target: Path, format: str, progress: Progress | None, floats_only=False) -> Converted:
    check_name(target)
    parts = files_of(source)
    if os.path.exists(target) and any(os.path.exists(path) and os.path.samefile(path, target) for path in parts):
        raise TurboError(f"{target} is the source itself. Expected another name: the source is never overwritten.")
    states = {path: state_of(path) for path in parts if os.path.isfile(path)}
    tensors, description, disk = opened(source)
    stored = stored_formats(tensors, source)
    if floats_only and not set(stored.values()) <= set(FLOATS):
        raise TurboError(
            f"{source} is quantized already ({description.format}). Expected a bf16, fp16 or fp32 checkpoint: take the "
            "unquantized file, or use convert, which rounds a second time."
        )
    planned = plan(tensors, stored, format)
    places = on_disk(planned, tensors)
    size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in places.values())
    check_target(target, size)  # before the long part
    count = _counter(progress, description.bytes + size)
    output = rewritten(source, tensors, disk, planned, stored, count)
    metadata = file_metadata(description, format) | {"turbowan.source_sha256": _sha256(parts, count)}
    size = stream_safetensors(target, places, while_unchanged(output, states), metadata)
    return Converted(str(target), size, _warnings(description, tensors, stored, planned))


def file_metadata(description: Description, format: str) -> dict[str, str]:
    """The metadata of a file that holds what is described, in a given format."""
    metadata = {
        "format": "pt",
        "turbowan.format": format,
        "turbowan.family": description.family,
        "turbowan.version": FILE_VERSION,
    }
    stated = transformer_config(description.metadata, description.path)  # the kind of some models is told there alone
    stated = {name: value for name, value in stated.items() if type(value) in (bool, int, float, str)}
    config = {"num_heads": description.num_heads, "text_dim": description.text_dim}
    usual = config == {"num_heads": description.dim // 128, "text_dim": 4096}
    config = stated | config
    if not usual or len(config) > 2:
        metadata["config"] = json.dumps({"transformer": config})  # where ComfyUI looks for sizes other than Wan's own
    if WORLD in description.metadata:
        metadata[WORLD] = description.metadata[WORLD]
    return metadata


def _counter(progress: Progress | None, total: int):
    done = 0

    def count(size: int):
        nonlocal done
        done += size
        if progress is not None:
            progress(done, total)

    return count


def _sha256(paths: list[Path], count) -> str:
    """The hash of files, one after the other. Raises TurboError where a record of a .pth is not what its checksum
    says."""
    digest = hashlib.sha256()
    for path in paths:
        _hash(path, digest, count)
    return digest.hexdigest()


def _hash(path: Path, digest, count) -> None:
    # the next piece is read and the checksums are computed beside the hash, which takes longer than both
    held = _Held(path)
    with open(path, "rb") as file, ThreadPoolExecutor(1, "checksums") as beside:
        chunk = file.read(_CHUNK)
        while chunk:
            checked, following = beside.submit(held.take, chunk), beside.submit(file.read, _CHUNK)
            digest.update(chunk)
            checked.result()
            count(len(chunk))
            chunk = following.result()


class _Held:
    """A file, piece by piece, held to the checksums that a .pth has of its records."""

    def __init__(self, path: Path):
        self.path, self.records = path, stored_checksums(path)[::-1]
        self.at = self.crc = 0

    def take(self, chunk: bytes) -> None:
        """Raises TurboError where a record that ends in this piece is not what its checksum says."""
        end_here, whole = self.at + len(chunk), memoryview(chunk)
        while self.records and self.records[-1][0] < end_here:
            start, end, expected, name = self.records[-1]
            self.crc = zlib.crc32(whole[max(0, start - self.at) : end - self.at], self.crc)
            if end > end_here:
                break
            if self.crc != expected:
                raise TurboError(
                    f"{self.path} is damaged: {shown(name)} is not what its checksum says. Download it again."
                )
            self.records.pop()
            self.crc = 0
        self.at = end_here


def _warnings(description: Description, tensors: dict, stored: dict[str, str], planned: Plan) -> list[str]:
    result = list(description.notes)
    quantized = [name for name, kind in stored.items() if kind not in FLOATS]
    changed = [name for name in quantized if stored[name] != planned[name] or is_encoded_anew(tensors, name)]
    if changed:
        kinds = ", ".join(sorted({stored[name] for name in changed}))
        effect = "the file is larger, not more precise"
        if any(planned[name] in QUANTIZED for name in changed):
            effect = "their weights are rounded a second time"
        result.append(
            f"{len(changed)} layers were quantized already ({kinds}): {effect}. "
            "The unquantized file is the better source."
        )
    if description.has_sla and "int8_block" not in planned.values():
        result.append(
            "Stock ComfyUI loaders read this file but drop proj_l, the trained half of its sparse-linear attention, "
            "which makes it another model. Load it with Turbo Loader, which keeps proj_l."
        )
    if description.has_sla and "fp8" in planned.values():
        result.append("Turbo Loader decodes fp8 to bf16: smaller on the disk only. int8_block is small in memory too.")
    return result
