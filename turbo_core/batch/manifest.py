"""What became of the jobs of a folder: one line of JSON for each event, only ever added to."""

import json
import os
import threading
from contextlib import ExitStack, suppress
from datetime import datetime, timezone
from pathlib import Path

from ..errors import TurboError
from ..files import alone, sweep
from ..pipeline.video import check_place
from .jobs import Job

NAME = "batch.jsonl"


class Manifest:
    """The manifest of a folder, and its lock: a second batch in the same folder gets an error that names the first."""

    def __init__(self, folder):
        """Raises TurboError where the folder cannot be made, or another batch writes to it."""
        self.folder = Path(folder)
        self.path = self.folder / NAME
        check_place(self.path)
        self._held, self._turn = ExitStack(), threading.Lock()
        self.known = {}  # name -> its last record

    def __enter__(self):
        self._held.enter_context(alone(self.path))
        sweep(self.folder)
        with suppress(FileNotFoundError), open(self.path, encoding="utf-8", errors="replace") as file:
            for line in file:
                # the last line of a process that was killed
                with suppress(ValueError, TypeError, KeyError, RecursionError):
                    record = json.loads(line)
                    self.known[record["name"]] = record
        self._file = self._held.enter_context(open(self.path, "a", encoding="utf-8"))
        if self._file.tell():
            self._file.write("\n")  # after such a line
        return self

    def __exit__(self, *_):
        sweep(self.folder)  # what processes of this batch left that were killed
        self._held.close()

    def is_done(self, job: Job) -> bool:
        """True where this very video is there. One that a killed process could not enter any more is entered."""
        known = self.known.get(job.name, {})
        if known.get("state") == "done" and known.get("id") == job.id:
            return known.get("bytes") == _size(self.folder / job.name)
        if not job.is_in(self.folder):
            return False
        self.record(job, "done", bytes=_size(self.folder / job.name))
        return True

    def record(self, job: Job, state: str, **more) -> None:
        """Add an event: state is begun, done or failed. It is on the disk when this returns."""
        at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        record = {"name": job.name, "id": job.id, "state": state, "line": job.line, "at": at, **more}
        try:
            with self._turn:  # two threads tell
                self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as error:
            raise TurboError(f"Could not write {self.path} ({error}). Free space and start again.") from error
        self.known[job.name] = record


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
