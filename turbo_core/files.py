"""Files written whole or not at all, told apart by their contents, and their sizes in words."""

import hashlib
import logging
import os
import re
import socket
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import TurboError, shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

_LOCK = ".turbowan-lock"
_FAR = 1 << 20  # a byte that nobody reads: Windows keeps others from what is locked
_END, _SPOT, _EVERY = 1 << 20, 1 << 12, 1 << 22  # of a sample, bytes
_LONGEST = 230  # bytes of a name: file systems take 255, and the lock beside it has a longer one


@contextmanager
def written_aside(target, sweeps: bool = True):
    """A path beside the target to write to. It takes the target's place at the end, once it is on the disk, and is
    removed after any failure or Ctrl-C: until then the target stays as it was.

    Raises TurboError, naming the other, while another process writes to the same target, and where the path beside it
    is somebody's. What a process that was killed left in that folder is removed; sweeps False: not now, for who writes
    thousands of files into one folder and calls `sweep` itself. The path ends in .part, which no loader lists: writers
    must be told the format that the target's name says.
    """
    target = Path(target)
    check_free(target)
    aside = target.with_name(f"{target.name}.part")
    if sweeps:
        sweep(target.parent)
    if not os.path.lexists(_lock_of(target)) and os.path.lexists(aside):  # ours has had a lock beside it before
        raise TurboError(f"{aside} is in the way: is a download of {target.name} not done? Move it, or choose a name.")
    with alone(target):
        try:
            yield aside
            with open(aside, "r+b") as file:
                os.fsync(file.fileno())  # a crash of the machine would leave an empty file under the good name
            os.replace(aside, target)
        finally:
            with suppress(OSError):  # gone after the rename
                aside.unlink()


@contextmanager
def alone(target: Path):
    """Hold the lock of a target; the system lets go of it when the process ends, however it does.

    Raises TurboError, naming the owner, where another process holds it.
    """
    place, tries = _lock_of(target), 20
    while True:
        try:
            file = open(place, "a+", encoding="utf-8")  # noqa: SIM115 (held until the end)
        except PermissionError:
            if fcntl or tries == 0:
                raise
            time.sleep(0.01)  # Windows, while its owner removes it
            tries -= 1
            continue
        if _lock(file) is False:
            with file:
                if tries == 0 or _has_owner(file):
                    raise _taken(target, file)
            time.sleep(0.01)  # its owner is about to write its name, or another process only looked or swept
            tries -= 1
            continue
        if tries == 0 or _is_at(file, place):  # there are disks on which no file is ever the same as itself
            break
        file.close()  # its owner was just done and removed it
        tries -= 1
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        _remove(file, place)


def check_free(target) -> None:
    """Raise TurboError, before any work, where a target's name is that of no file, or another process writes to it."""
    target = Path(target)
    if os.path.exists(target) and not os.path.isfile(target):
        raise TurboError(f"{target} is a folder, a pipe or a device. Expected the name of an ordinary file to write.")
    try:
        raw = os.fsencode(target)
    except UnicodeEncodeError:  # a lone surrogate
        raw = b"\0"
    if b"\0" in raw:
        raise TurboError(f"{target.name} is a name that no disk takes. Choose another one.")
    if len(os.fsencode(target.name)) > _LONGEST:
        raise TurboError(f"{shown(target.name)} is too long a name. Expected at most {_LONGEST} bytes: shorten it.")
    if not fcntl and is_device(target.name):
        raise TurboError(f"{shown(target.name)} is a name that Windows keeps for a device. Choose another one.")
    with suppress(OSError), open(_lock_of(target), "r+", encoding="utf-8") as file:
        if _has_owner(file):
            if _lock(file) is False:
                raise _taken(target, file)
            _unlock(file)


def check_apart(written, read=()) -> None:
    """Raise TurboError where two files that are to be written are one, or one of them is read. None stands for none."""
    taken = {}
    for path, is_read in [*((path, True) for path in read), *((path, False) for path in written)]:
        try:
            place = None if path is None else os.path.normcase(os.path.realpath(path))
        except ValueError:  # a name that no disk takes, which is told when it is opened
            continue
        if place in taken and not is_read:
            what = "it is read" if taken[place] else "so is another file of that name"
            raise TurboError(f"{path} is to be written, and {what}. Choose another name for what is written.")
        if place is not None:
            taken[place] = is_read


def is_device(name: str) -> bool:
    """Whether Windows takes a name, whatever its suffix, for a device."""
    return re.fullmatch(r"(con|prn|aux|nul|(com|lpt)[0-9\u00b9\u00b2\u00b3])\s*(\..*)?", name.lower(), re.S) is not None


def _has_owner(lock) -> bool:
    return os.fstat(lock.fileno()).st_size > 0


def _taken(target, lock) -> TurboError:
    lock.seek(0)
    owner = lock.read().strip() or "another process"
    return TurboError(f"{target} is being written by {owner}. Wait until it is done, or choose another name.")


def _lock_of(target: Path) -> Path:
    return target.with_name(f".{target.name}{_LOCK}")


def _lock(file) -> bool | None:
    """Lock an open file for this process; False where another one has, None on a disk that knows no locks."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            file.seek(_FAR)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _is_at(file, place: Path) -> bool:
    """True where an open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(place))
    except OSError:
        return False


def _unlock(file) -> None:
    """Let go of a lock before the file is closed, which Windows asks for."""
    if not fcntl:
        with suppress(OSError):
            file.seek(_FAR)
            msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)


def _remove(file, place: Path) -> None:
    """Remove a lock that this process holds, while it does; Windows removes no open file, and none that another process
    took meanwhile."""
    if not fcntl:
        _unlock(file)
        file.close()
    with suppress(OSError):
        place.unlink()
    file.close()


def sweep(folder: Path) -> None:
    """Remove what processes that were killed left in a folder: locks that nobody holds, and the parts beside them."""
    for place in folder.glob(f".*{_LOCK}"):
        with suppress(OSError), open(place, "a", encoding="utf-8") as file:
            if _lock(file) and _is_at(file, place):  # not where it is unknown, nor what a writer removed just now
                file.truncate(0)  # while its part goes nobody owns it
                part = folder / f"{place.name[1:].removesuffix(_LOCK)}.part"
                if part.exists():
                    part.unlink()
                    logging.warning("TurboWan: removed %s, which a process that was killed had begun.", part)
                _remove(file, place)


def state_of(path) -> tuple[int, int, int]:
    """What changes when a file is written to or replaced while it is read."""
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


def write_whole(path: Path, text: str, cure: str = "Free space and start again.", sweeps: bool = True) -> None:
    """Write a text file whole or not at all; sweeps: see written_aside. Raises TurboError with the cure where the
    system does not let it."""
    try:
        with written_aside(path, sweeps) as aside:
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


def sample(path) -> str:
    """Tells large files apart in a moment, where `digest` takes a minute: by their sizes, their ends and some
    bytes of every four megabytes. A layer's weight is larger than that, so none changes unseen; single numbers may."""
    if not os.path.isfile(path):
        return "no such file"
    size = os.path.getsize(path)
    contents = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start, count in ((0, _END), (max(0, size - _END), _END), *((at, _SPOT) for at in range(0, size, _EVERY))):
            file.seek(start)
            contents.update(file.read(count))
    return f"{size} bytes, {contents.hexdigest()[:16]}"


def counted(named, progress=None):
    """The pairs (name, tensor) of `named`, one after the other; progress: callable (bytes done, total), while there are
    more."""
    named, done = list(named), 0
    total = sum(tensor.nbytes for _, tensor in named)
    for name, tensor in named:
        yield name, tensor
        done += tensor.nbytes
        if progress is not None and done < total:
            progress(done, total)


def human_bytes(count: int) -> str:
    """12,345,678 -> "12.3 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
