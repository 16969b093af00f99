"""What became of the jobs of a folder: one line of JSON for each event, only ever added to."""

import json
import threading
from contextlib import ExitStack, suppress
from datetime import datetime, timezone

from .jobs import Job
from .remote import folder_of


class Manifest:
    """The manifest of a folder, and its lock: a second batch in the same folder gets an error that names the first."""

    def __init__(self, folder):
        """folder: a path, an address, or a Folder. Entering raises TurboError where it cannot be made, or another batch
        writes to it."""
        self.folder = folder_of(folder)
        self._held, self._turn = ExitStack(), threading.Lock()
        self.known = {}  # name -> (id, state, bytes) of its last record

    def __enter__(self):
        lines, self._add = self._held.enter_context(self.folder.journal())
        for line in lines:
            with suppress(ValueError, TypeError, KeyError, RecursionError):  # a torn line of a process that was killed
                self._know(json.loads(line))
        return self

    def __exit__(self, *_):
        self._held.close()

    def is_done(self, job: Job) -> bool:
        """True where this very video is there. One that a killed process could not enter any more is entered."""
        known, size = self.known.get(job.name), self.folder.size(job.name)
        if size is not None and known == (job.id, "done", size):
            return True
        if not self.folder.holds(job.name, job.id):
            return False
        self.record(job, "done", bytes=self.folder.size(job.name))
        return True

    def is_foreign(self, job: Job) -> bool:
        """True where a file of this name is there that no batch of this pack made: it is somebody's."""
        return self.folder.is_foreign(job.name)

    def record(self, job: Job, state: str, **more) -> None:
        """Add an event: state is begun, done or failed. In a folder of this machine it is on the disk when this
        returns."""
        at = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        record = {"name": job.name, "id": job.id, "state": state, "line": job.line, "at": at, **more}
        with self._turn:  # two threads tell
            self._add(json.dumps(record, ensure_ascii=False))
        self._know(record)

    def _know(self, record):
        self.known[record["name"]] = record["id"], record["state"], record.get("bytes")
