"""A checkpoint in one file or in several: a folder as Diffusers writes it, or the index that names its shards."""

import functools
import json
import operator
import os
import re
from pathlib import Path

from ...errors import TurboError, shown
from ..read import MAX_HEADER, SAFETENSORS_SUFFIXES, TensorFile, open_tensors

INDEX = ".safetensors.index.json"
_BLOCK = re.compile(r"(?:^|\.)blocks\.\d+\.(?=(?:self_attn|cross_attn|attn1|attn2|ffn)\.)")
_CURE = "Download the whole folder again."


def files_of(path) -> list[Path]:
    """The files that a checkpoint consists of, its index first; [path] where it is a single one.

    path: a file, an index, or a folder with either. Raises TurboError for a folder that has no single model, an index
    that is damaged or names anything but files beside it, and shards that are missing.
    """
    path = Path(path)
    if os.path.isdir(path):
        path = _in_folder(path)
    if not path.name.endswith(INDEX) or not os.path.isfile(path):
        return [path]
    shards = [path.with_name(name) for name in dict.fromkeys(_weight_map(path).values())]
    missing = [shard.name for shard in shards if not os.path.isfile(shard)]
    if missing:
        names = ", ".join(map(shown, missing[:4])) + (", ..." if len(missing) > 4 else "")
        raise TurboError(
            f"{path} names {len(shards)} shards, of which {len(missing)} {'is' if len(missing) == 1 else 'are'} not "
            f"there: {names}. Download what is missing into {path.parent}."
        )
    return [path, *shards]


def open_checkpoint(path, writable: bool = False, contents: bool = True) -> TensorFile:
    """read.open_tensors for a checkpoint of one file or several.

    Raises TurboError like it and files_of, and for shards that do not hold what the index says or are not of one model.
    """
    index, *shards = files_of(path)
    if not shards:
        return open_tensors(index, writable, contents)
    said = _weight_map(index)
    files = {shard: open_tensors(shard, writable, contents) for shard in shards}
    tensors, metadata = {}, {}
    for shard, file in files.items():
        expected = {name for name, place in said.items() if place == shard.name}
        wrong = next(iter(sorted(expected.symmetric_difference(file.tensors))), None)
        if wrong is not None:
            what = "lacks" if wrong in expected else "holds"
            where = "there" if wrong in expected else f"in {said[wrong]}" if wrong in said else "nowhere"
            raise TurboError(
                f"{shard} is not the shard that {index.name} describes: it {what} {shown(wrong)}, which the index says "
                f"is {where}. It is of another model or another version. {_CURE}"
            )
        for key, value in file.metadata.items():
            if metadata.setdefault(key, value) != value:
                raise TurboError(
                    f"{shard} is not of the same model as the shards before it: its metadata {shown(key)} is "
                    f"{shown(value)[:60]}, theirs {shown(metadata[key])[:60]}. {_CURE}"
                )
        tensors |= file.tensors
    _check_alike(files)
    notes = [f"{len(shards)} shards", *dict.fromkeys(note for file in files.values() for note in file.notes)]
    disk = functools.reduce(operator.or_, (file.disk for file in files.values()))
    return TensorFile("safetensors", metadata, tensors, notes, disk)


def _in_folder(folder: Path) -> Path:
    """The index or the only model of a folder, or of its folder `transformer`."""
    inner = [path for name in ("transformer", "transformer_2") if (path := folder / name).is_dir()]
    if len(inner) == 2:
        raise TurboError(f"{folder} is a folder with two models, transformer and transformer_2. Name one of the two.")
    for where in (folder, *inner):
        try:
            names = sorted(path for path in where.iterdir() if path.is_file())
        except OSError as error:
            raise TurboError(f"{where} is a folder that may not be read. Check the rights to it.") from error
        models = [path for path in names if path.name.endswith(INDEX)]
        models = models or [path for path in names if path.suffix.lower() in SAFETENSORS_SUFFIXES]
        if len(models) == 1:
            return models[0]
        if models:
            listed = ", ".join(path.name for path in models[:4]) + (", ..." if len(models) > 4 else "")
            raise TurboError(f"{where} is a folder with {len(models)} models: {listed}. Name one of them.")
    raise TurboError(
        f"{folder} is a folder without a *{INDEX} or a .safetensors file. Expected those, or the name of one file."
    )


def _weight_map(index: Path) -> dict[str, str]:
    """{name of a tensor: name of the file beside the index that holds it}."""

    def once(pairs):
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("it has one name twice")
        return found

    try:
        with open(index, "rb") as file:
            text = file.read(MAX_HEADER + 1)
        if len(text) > MAX_HEADER:
            raise ValueError(f"it is larger than {MAX_HEADER:,} bytes")
        content = json.loads(text, object_pairs_hook=once)
        found = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
            raise ValueError("it has no weight_map of names and files")
    except PermissionError as error:
        raise TurboError(f"{index} may not be read. Check the rights to it.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise TurboError(f"{index} is no index of shards: {str(error)[:200]}. {_CURE}") from error
    for name in dict.fromkeys(found.values()):
        if name in ("", ".", "..") or re.search(r"[/\\:\0]", name):
            raise TurboError(f"{index} names {shown(name)}. Expected the names of files beside it: it was refused.")
        if Path(name).suffix.lower() not in SAFETENSORS_SUFFIXES:
            raise TurboError(f"{index} names {shown(name)}. Expected .safetensors files: it was refused.")
    return found


def _check_alike(files: dict[Path, TensorFile]) -> None:
    """Raise TurboError where two shards have the same layer of their blocks in different shapes."""
    first = {}
    for shard, file in files.items():
        for name, tensor in file.tensors.items():
            if not _BLOCK.search(name):
                continue
            layer = _BLOCK.sub("", name, count=1)
            other, theirs, shape = first.setdefault(layer, (shard, name, tuple(tensor.shape)))
            if shape != tuple(tensor.shape):
                raise TurboError(
                    f"{shard} is not of the same model as {other.name}: {shown(name)} is {list(tensor.shape)}, "
                    f"{shown(theirs)} there {list(shape)}. {_CURE}"
                )
