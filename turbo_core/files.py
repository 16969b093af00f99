"""Files written whole or not at all, and what is said of their size."""

import hashlib
import os
from contextlib import contextmanager
from pathlib import Path

from .errors import TurboError


def human_bytes(count: int) -> str:
    """12,345,678 -> "12.3 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    try:
        with complete_or_nothing(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TurboError(f"Could not write {path} ({error}). Free space and start again.") from error


def digest(files) -> str:
    """Tells the contents of files apart: SHA-256, shortened. A gigabyte takes some seconds."""
    contents = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                contents.update(chunk)
    return contents.hexdigest()[:16]


@contextmanager
def complete_or_nothing(path):
    """A path beside the target to write to; renamed to it at the end, removed after any failure or Ctrl-C."""
    path = Path(path)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
