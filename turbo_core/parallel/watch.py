"""Who is still there: each process tells a store that it lives; who is gone without a word is named by the others.

A collective that waits for a process that is gone fails at once with gloo and may wait for hours with NCCL. So a thread
looks too, and ends this process when another one has been silent for long.
"""

import os
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager

BEAT = 0.5  # seconds between signs of life
SILENT = 3.0  # after a collective failed, who gives no sign for so long is gone
PATIENCE = 60.0  # while nothing failed


class Ended(BaseException):
    """Somebody asked this process to end (SIGTERM), as torchrun does when another one is gone."""


class Watch:
    """Signs of life of the processes of a store."""

    def __init__(self, store, rank: int, size: int):
        self.store, self.rank, self.size = store, rank, size
        self._over = threading.Event()
        self._count = 0
        store.set(f"name/{rank}", f"process {rank} of {size} ({socket.gethostname()}, pid {os.getpid()})")
        self._beat(store)
        self._thread = threading.Thread(target=self._run, name="signs of life", daemon=True)
        self._thread.start()

    def name(self, rank: int) -> str:
        return self.store.get(f"name/{rank}").decode()

    def leave(self, done: bool) -> None:
        """The signs end; done: and nobody is to miss them."""
        self._over.set()
        self._thread.join()
        if done:
            self.store.set(f"done/{self.rank}", "")

    def has_failed(self) -> bool:
        """True once a process told of a failure."""
        return self.store.add("failures", 0) > 0

    def is_first_to_tell(self) -> bool:
        """True in one process, whose failure is told; those of others follow from it."""
        return self.store.add("failures", 1) == 1

    def gone(self) -> list[int]:
        """The processes that gave no sign for SILENT seconds, which it takes to know."""
        before = self._beats(self.store)
        time.sleep(SILENT)
        after = self._beats(self.store)
        return [rank for rank in range(self.size) if rank != self.rank and before[rank] == after[rank] is not None]

    def _beat(self, store):
        self._count += 1
        store.set(f"beat/{self.rank}", str(self._count))

    def _beats(self, store):
        """The last sign of each process; None of those that are done."""
        done = [store.check([f"done/{rank}"]) for rank in range(self.size)]
        return [None if done[rank] else store.get(f"beat/{rank}") for rank in range(self.size)]

    def _run(self):
        store, seen = self.store, {}
        try:
            while not self._over.wait(BEAT):
                self._beat(store)
                if self._count % 10:
                    continue
                now = time.monotonic()
                for rank, beat in enumerate(self._beats(store)):
                    if beat is None or seen.get(rank, (None,))[0] != beat:
                        seen[rank] = beat, now
                silent = [rank for rank, (_, since) in seen.items() if now - since > PATIENCE]
                if silent:
                    self._end(silent)
        except RuntimeError:  # the store is gone with the launcher, which tells of that itself
            pass

    def _end(self, silent):
        if self.is_first_to_tell():
            names = ", ".join(map(self.name, silent))
            what = (
                f"{names} gave no sign of life for {PATIENCE:.0f} s: is the machine still there? The clip is not made."
            )
            print(f"turbo-core: {what}", file=sys.stderr, flush=True)
        os._exit(2)  # the main thread may wait in a collective that never ends


@contextmanager
def ending():
    """A context in which SIGTERM raises Ended."""

    def end(number, frame):
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
