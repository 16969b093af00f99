"""Where the videos of a batch go: a folder of this machine, with the settings of each beside it and a journal."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..errors import TurboError
from ..files import alone, check_free, digest, sweep, write_whole
from ..pipeline.video import check_place, read_made, write_video

NAME = "batch.jsonl"  # the journal
_START = 48  # bytes of an MP4 in which stands how long it is


class Folder:
    """A folder of this machine. What is written there appears when it is whole."""

    of_one_process, signs_later = False, True  # others see what one writes; and it can be written again

    def __init__(self, path):
        self.path = Path(path)

    def __str__(self):
        return str(self.path)

    def shared(self) -> str:
        """Its name for another process."""
        return str(self.path.resolve())

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        try:
            return (self.path / name).stat().st_size
        except OSError:
            return None

    def holds(self, name: str, id: str) -> bool:
        """True where the video of this name says of itself that it is the job's; of one that says nothing, what lies
        beside it does."""
        place = self.path / name
        with suppress(TurboError, OSError):
            made = read_made(place)
            if made is None and (told := _told(place.with_suffix(".json"))) and told.get("video") == digest([place]):
                made = told["settings"]
            return made is not None and made.get("id") == id
        return False

    def is_foreign(self, name: str) -> bool:
        """True where what lies there under this name, or beside it, is of no batch: a job has an id, a clip of
        turbo-core generate has none. The files themselves tell, whatever the journal knew of the name."""
        place = self.path / name
        told = _told(place.with_suffix(".json"))
        if told is None and os.path.lexists(place.with_suffix(".json")):
            return True
        if not os.path.lexists(place):
            return False
        made = None
        with suppress(TurboError, OSError):
            made = read_made(place)
        if made is not None:
            return "id" not in made
        return told is None or not (_is_what_was_written(place, told) or _was_cut_short(place, told))

    def write(self, name: str, frames, beside: dict, metadata: bool = True, signer=None) -> int:
        """Write a video, and its settings beside it, and return its bytes. beside: what is told of it, its "settings"
        also within it where `metadata` says so. Raises TurboError."""
        place = self.path / name

        def finish(aside, target):
            if signer:
                signer.sign(aside, target)
            # the video last: where it is, all is there; and what lies beside tells whose it is
            self._write_beside(name, beside, aside)

        write_video(place, frames, made=beside["settings"] if metadata else None, finish=finish, sweeps=False)
        return os.path.getsize(place)

    def sign(self, name: str, signer) -> int | None:
        """Put credentials into a video; its bytes, None where it has some or signing fails, which the log tells."""
        place = self.path / name
        if signer.has_signed(place):
            return None
        signer.sign(place, place)
        if not signer.has_signed(place):
            return None
        with suppress(OSError, ValueError, RecursionError, TypeError):
            beside = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
            self._write_beside(name, beside, place)
        return os.path.getsize(place)

    def _write_beside(self, name, beside, video):
        place, told = self.path / name, beside | {"video": digest([video]), "bytes": os.path.getsize(video)}
        with open(video, "rb") as file:
            told["start"] = file.read(_START).hex()
        if place.is_file() and place != video:
            told["before"] = digest([place])  # what this process may be killed before it replaces
        text = json.dumps(told, indent=2, ensure_ascii=False) + "\n"
        write_whole(place.with_suffix(".json"), text, sweeps=False)

    def free(self) -> int:
        """Bytes that the disk still takes."""
        there = next(place for place in (self.path, *self.path.absolute().parents) if os.path.exists(place))
        return shutil.disk_usage(there).free

    def check(self) -> None:
        """Raise TurboError where nothing can be written there or another batch is at work; nothing is made."""
        there = next(place for place in (self.path, *self.path.absolute().parents) if os.path.exists(place))
        if not os.path.isdir(there):
            raise TurboError(f"{there} is a file. Expected a folder for the videos: choose another name.")
        if not os.access(there, os.W_OK | os.X_OK):
            raise TurboError(f"{there} may not be written to. Check its rights, or choose another folder.")
        if there == self.path:
            check_free(self.path / NAME)

    def check_shared(self) -> None:
        """Raise TurboError where a machine of a cluster does not see it."""
        if not os.path.isdir(self.path):
            raise TurboError(f"{self.path} is not there on a machine of the cluster. Use a folder that all share.")

    @contextmanager
    def journal(self) -> Iterator[tuple[list[str], Callable[[str], None]]]:
        """(lines of earlier batches, what adds a line, which is on the disk when it returns). Raises TurboError where
        the folder cannot be made, or another batch writes to it, which is named."""
        path = self.path / NAME
        check_place(path)
        with ExitStack() as held:
            try:
                held.enter_context(alone(path))
                sweep(self.path)
                lines = []
                with suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as file:
                    lines = file.readlines()
                file = held.enter_context(open(path, "a", encoding="utf-8"))
                if file.tell():
                    file.write("\n")  # after the torn line of a process that was killed
            except OSError as error:
                raise TurboError(
                    f"{path} cannot be written ({error.strerror or error}). Check whose it is and the free space, or "
                    "choose another folder."
                ) from error

            def add(line):
                try:
                    file.write(line + "\n")
                    file.flush()
                    os.fsync(file.fileno())
                except OSError as error:
                    raise TurboError(f"Could not write {path} ({error}). Free space and start again.") from error

            yield lines, add
            sweep(self.path)  # what processes of this batch left that were killed


def _told(beside: Path) -> dict | None:
    """What lies beside a job's video, None where it is of no job."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        told = json.loads(beside.read_text(encoding="utf-8"))
        return told if "id" in told["settings"] else None
    return None


def _is_what_was_written(place: Path, told: dict) -> bool:
    with suppress(OSError):
        return digest([place]) in (told.get("video"), told.get("before"))
    return False


def _was_cut_short(place: Path, told: dict) -> bool:
    """True for the beginning of the video that was written, and for what a power cut leaves: nothing, or zeros."""
    with suppress(OSError, ValueError, TypeError), open(place, "rb") as file:
        start = file.read(_START)
        return not any(start) or (
            os.path.getsize(place) < told.get("bytes", 0) and bytes.fromhex(told.get("start", "")).startswith(start)
        )
    return False
