"""A list of jobs, as a person or a spreadsheet writes it: lines of prompts, CSV, or lines of JSON."""

import csv
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import TurboError, shown
from ..files import digest, is_device, sample
from ..lora import Lora, as_loras
from ..pipeline import Clip
from ..pipeline.sizes import parse_size
from ..pipeline.video import VIDEO_SUFFIXES

COLUMNS = (
    "prompt", "name", "seed", "seeds", "image", "size", "adaptive", "frames", "steps", "sigma_max", "topk", "precision",
    "ode", "tiled", "lora", "lora_low",
)  # fmt: skip
MOST_BYTES, MOST_JOBS, MOST_LETTERS = 1 << 28, 1_000_000, 10_000
MOST_NAME = 220  # bytes; with what is beside a file while it is written and signed, less than a disk takes
_LORAS = "lora", "lora_low"


class Job(NamedTuple):
    """A video to make. name: of its file; id: tells apart all that the video depends on; picture: digest of its first
    frame's file, None without."""

    line: int
    name: str
    id: str
    picture: str | None
    clip: Clip


class Fault(NamedTuple):
    """A line that is no job, and why."""

    line: int
    error: str


def read_jobs(path, defaults: Clip, models: str = "") -> tuple[list[Job], list[Fault]]:
    """The jobs of a file and the lines that are none.

    *.jsonl (or .ndjson): an object a line; *.csv (or .tsv): a first row of column names, commas, semicolons or
    tabs; anything else but .json: a prompt a line, empty lines and those that begin with # left out. Columns are
    COLUMNS, what is left out comes from `defaults`; seeds is "0-9" or "1,5,8" and makes as many videos; lora is
    FILE:STRENGTH, several with | between them or as a list. Paths of images and LoRAs count from the file's folder.
    models: digest of the models, part of each job's id. Raises TurboError where the file cannot be read at all.
    """
    path = Path(path)
    text, jobs, faults, names = _text(path), [], [], {}
    contents, seen = functools.cache(_contents), functools.cache(lambda picture: digest([picture]))
    for file, _ in (*defaults.lora, *defaults.lora_low):
        contents(file)  # one that is not there is no fault of each line
    for line, found in _rows(text, path):
        try:
            if isinstance(found, TurboError):
                raise found
            for job in _jobs_of(line, found, defaults, path.parent, models, contents, seen):
                if len(jobs) == MOST_JOBS:
                    raise TurboError(f"more than {MOST_JOBS:,} videos. Expected fewer: split the file.")
                stem = Path(job.name).stem  # settings lie beside a video under its name, whatever its suffix
                first = names.setdefault(unicodedata.normalize("NFC", stem).casefold(), job)  # as disks may
                if first is not job:
                    what = "the same video" if first.id == job.id else f"the same name {shown(stem)}"
                    raise TurboError(f"{what} as line {first.line}. Expected another seed or name.")
                jobs.append(job)
        except TurboError as error:
            faults.append(Fault(line, str(error)))
    if not jobs and not faults:
        raise TurboError(f"{path} holds no jobs. Expected a prompt a line, CSV or lines of JSON.")
    return jobs, faults


def by_lora(jobs: list[Job]) -> list[Job]:
    """The jobs with those of the same LoRAs one after the other, in the order in which these first appear."""
    order = {}
    return sorted(jobs, key=lambda job: order.setdefault(job.clip.loras, len(order)))


def digest_of_models(paths) -> str:
    """Tells sets of files apart by samples of each, without reading 28 GB."""
    return hashlib.sha256("\0".join(map(sample, paths)).encode()).hexdigest()[:16]


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise TurboError(f"{path} is larger than {MOST_BYTES >> 20} MB. Expected a list of jobs: split it.")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TurboError(f"{path} cannot be read ({error.strerror or error}). Check the path.") from error
    except UnicodeDecodeError as error:
        raise TurboError(f"{path} is not text in UTF-8 (byte {error.start}). Save it as UTF-8.") from error


def _rows(text: str, path: Path) -> Iterator[tuple[int, dict | TurboError]]:
    """(number of the line, its columns or what is wrong with it)."""
    kind = path.suffix.lower()
    if kind == ".json":
        raise TurboError(f"{path} is JSON. Expected an object a line: save it as .jsonl.")
    if kind in (".csv", ".tsv"):
        yield from _csv_rows(text, path)
        return
    for line, content in enumerate(text.split("\n"), 1):
        content = content.strip()
        if kind in (".jsonl", ".ndjson"):
            if content:
                yield line, _json_row(content)
        elif content and not content.startswith("#"):
            yield line, {"prompt": content}


def _json_row(content: str) -> dict | TurboError:
    try:
        found = json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return TurboError(f'not JSON ({shown(error)}). Expected an object like {{"prompt": "..."}}.')
    return found if isinstance(found, dict) else TurboError('not an object. Expected one like {"prompt": "..."}.')


def _no_constant(name):
    raise ValueError(f"{name} is no number")


def _csv_rows(text: str, path: Path):
    head = text.partition("\n")[0]
    separator = ";" if ";" in head and "," not in head else "\t" if "\t" in head and "," not in head else ","
    rows = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
    names = None
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if names is None:
                names = [name.strip().lower() for name in row]
                if "prompt" not in names or len(set(names)) < len(names):
                    raise TurboError(
                        f"{path}: the first row is {shown(', '.join(names))}. Expected names of columns, each once, "
                        f"prompt among them: {', '.join(COLUMNS)}."
                    )
            elif len(row) > len(names):
                yield rows.line_num, TurboError(f"{len(row)} cells. Expected {len(names)}: quote cells with commas.")
            else:
                yield rows.line_num, {name: cell.strip() for name, cell in zip(names, row) if cell.strip()}
    except csv.Error as error:
        # where the next row begins is not known: parts of a cell would become prompts
        yield (
            rows.line_num,
            TurboError(f"not CSV ({shown(error)}). Expected quotes in pairs; lines from here on are not read."),
        )


def _jobs_of(line: int, row: dict, defaults: Clip, folder: Path, models: str, contents, seen) -> Iterator[Job]:
    unknown = [key for key in row if key not in COLUMNS]
    if unknown:
        raise TurboError(f"unknown column {shown(unknown[0])}. Expected some of {', '.join(COLUMNS)}.")
    prompt = row.get("prompt", "")
    if not isinstance(prompt, str) or not prompt.strip():
        raise TurboError("no prompt. Expected a text.")
    if len(prompt) > MOST_LETTERS:
        raise TurboError(
            f"a prompt of {len(prompt):,} letters. Expected at most {MOST_LETTERS:,}: umT5 reads 512 tokens."
        )
    apart = "name", "seed", "seeds", "image", *_LORAS
    settings = {key: _value(key, value) for key, value in row.items() if key not in apart}
    settings |= {key: _loras(key, row[key], folder) for key in _LORAS if key in row}
    if "image" in row:
        settings["image"] = folder / _string("image", row["image"])
        if not os.path.isfile(settings["image"]):
            raise TurboError(f"image {shown(settings['image'])} is not a file. Check the path.")
    name = _file_name(row["name"]) if "name" in row else None
    seeds, picture = _seeds(row, defaults.seed), settings.get("image")
    try:
        shows = None if picture is None else seen(picture)
    except OSError as error:
        raise TurboError(f"image {shown(picture)} cannot be read ({error.strerror}). Check its rights.") from error
    for seed in seeds:
        clip = dataclasses.replace(defaults, **settings, seed=seed)
        id = _id(clip, models, shows, contents)
        if name is None:
            own = f"{_slug(prompt)}-seed{seed}-{id[:12]}.mp4"  # of a million that begin alike no two are the same
        else:
            own = name if len(seeds) == 1 else f"{Path(name).stem}-{seed}{Path(name).suffix}"
        if len(os.fsencode(own)) > MOST_NAME:
            raise TurboError(f"{shown(own)} is too long a name. Expected at most {MOST_NAME} bytes: shorten it.")
        yield Job(line, own, id, shows, clip)


def _seeds(row: dict, default: int) -> list[int]:
    if "seeds" not in row:
        return [_whole("seed", row["seed"])] if "seed" in row else [default]
    if "seed" in row:
        raise TurboError("seed and seeds. Expected one of them.")
    seeds = []
    for part in _string("seeds", row["seeds"]).split(","):
        first, dash, last = part.strip().partition("-")
        low = _whole("seeds", first)
        high = _whole("seeds", last) if dash else low
        if not 0 <= high - low < MOST_JOBS:
            raise TurboError(f"seeds {shown(part)}. Expected a range that rises, like 0-9.")
        seeds += range(low, high + 1)
        if len(seeds) > MOST_JOBS:
            raise TurboError(f"more than {MOST_JOBS:,} seeds. Expected fewer.")
    return seeds


def _value(key: str, value):
    if key == "size":
        return parse_size(_string(key, value))
    if key in ("frames", "steps"):
        return _whole(key, value)
    if key in ("adaptive", "ode", "tiled"):
        known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() not in known:
            raise TurboError(f"{key} is {shown(value)}. Expected true or false.")
        return known[str(value).lower()]
    if key == "topk" and str(value).lower() in ("auto", "dense"):
        return None if str(value).lower() == "dense" else "auto"
    if key in ("topk", "sigma_max"):
        return _number(key, value)
    return _string(key, value)


def _string(key, value) -> str:
    if isinstance(value, (dict, list, bool)) or value is None:
        raise TurboError(f"{key} is {shown(value)}. Expected a text.")
    return str(value)


def _whole(key, value) -> int:
    if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,20}", str(value).strip()):
        raise TurboError(f"{key} is {shown(value)}. Expected a whole number.")
    return int(value)


def _number(key, value) -> float:
    if isinstance(value, bool) or not re.fullmatch(r"[0-9.]{1,20}(e[+-]?[0-9]{1,3})?", str(value).strip().lower()):
        raise TurboError(f"{key} is {shown(value)}. Expected a number.")
    try:
        return float(value)
    except ValueError as error:
        raise TurboError(f"{key} is {shown(value)}. Expected a number.") from error


def _file_name(name) -> str:
    name = _string("name", name).strip()
    stem, suffix = os.path.splitext(name)
    if suffix.lower() not in VIDEO_SUFFIXES:
        stem, suffix = name, ".mp4"
    forbidden = set('/\\<>:"|?*') & set(stem)
    # the last are devices in Windows, whatever the suffix
    if not stem or forbidden or stem[0] == "." or stem[-1] in ". " or not stem.isprintable() or is_device(stem):
        raise TurboError(f"name is {shown(name)}. Expected the plain name of a file, without folders.")
    return stem + suffix.lower()


def _slug(prompt: str) -> str:
    words = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")
    return words.encode()[:48].decode(errors="ignore").strip("-") or "video"


def _loras(key, value, folder: Path) -> tuple[Lora, ...]:
    parts = value if isinstance(value, list) else _string(key, value).split("|")
    parts = [_string(key, part).strip() for part in parts]
    return as_loras(str(folder / part) for part in parts if part)


def _contents(file: Path) -> str:
    if not os.path.isfile(file):
        raise TurboError(f"LoRA {shown(file)} is not a file. Check the path.")
    try:
        return digest([file])
    except OSError as error:
        raise TurboError(f"LoRA {shown(file)} cannot be read ({error.strerror}). Check its rights.") from error


def _id(clip: Clip, models: str, shows: str | None, contents) -> str:
    told = {key: str(value) for key, value in vars(clip).items() if key not in _LORAS} | {"models": models}
    for key in _LORAS:
        if getattr(clip, key):  # a video without any has the name that it had before there were LoRAs
            told[key] = [[contents(file), strength] for file, strength in getattr(clip, key)]
    if shows is not None:
        told["image"] = shows  # what is in the file, not where it lies
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:16]
