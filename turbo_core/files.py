"""Files written whole or not at all, told apart by their contents, and their sizes in words."""

import hashlib
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import TurboError


@contextmanager
def written_aside(target):
    """A path beside the target to write to. It takes the target's place at the end, once it is on the disk, and is
    removed after any failure or Ctrl-C: until then the target stays as it was."""
    target = Path(target)
    # a process has its own; no loader lists this ending, so writers must be told the format that the target's name says
    aside = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        yield aside
        with open(aside, "r+b") as file:
            os.fsync(file.fileno())  # a crash of the machine would leave an empty file under the good name
        os.replace(aside, target)
    finally:
        with suppress(OSError):  # gone after the rename
            aside.unlink()


def write_whole(path: Path, text: str, cure: str = "Free space and start again.") -> None:
    """Write a text file whole or not at all. Raises TurboError with the cure where the system does not let it."""
    try:
        with written_aside(path) as aside:
            aside.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TurboError(f"Could not write {path} ({error}). {cure}") from error


def digest(files) -> str:
    """Tells the contents of files apart: SHA-256, shortened. A gigabyte takes some seconds."""
    contents = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                contents.update(chunk)
    return contents.hexdigest()[:16]


def human_bytes(count: int) -> str:
    """12,345,678 -> "12.3 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
