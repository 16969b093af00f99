"""Jobs over several processes of this machine, one for each card, each with a pipeline of its own.

The parent alone writes the manifest. A process that dies gives its jobs back; a job that was in work when its process
died twice is failed, so that it cannot take the rest down with it.
"""

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait

import torch

from ..errors import TurboError
from ..pipeline import Pipeline
from .jobs import Job
from .making import Faults, Outcome, make
from .remote import folder_of

_DEATHS = 2


def make_by_workers(
    devices: list, settings: dict, jobs: list[Job], folder, tell: Callable[[Outcome], None], **options
) -> None:
    """Make all jobs by a process on each of `devices`, which may be there twice; settings: of Pipeline, without its
    device; a memory that is given there is that of a device.

    options: of make. Raises TurboError where a process finds the models at fault, or dies before it begins a job.
    """
    folder, todo, deaths, idle_deaths = folder_of(folder), deque(jobs), Counter(), 0
    if folder.of_one_process:
        raise TurboError(f"{folder} is memory of one process, and several make the videos: leave --workers out.")
    workers = []
    try:
        while True:
            while todo and len(workers) < len(devices):
                place = next(place for place in range(len(devices)) if place not in {w.place for w in workers})
                workers.append(_Worker(place, settings_at(place, devices, settings), folder.shared(), options))
            for worker in workers:
                if not worker.chunk and todo:
                    # large at first, so that prompts are encoded together; small at the end, so that none waits
                    count = max(1, len(todo) // (2 * len(devices)))
                    if deaths[todo[0].name]:
                        count = 1  # alone, so that a second death is its own
                    worker.give([todo.popleft() for _ in range(count)])
            busy = [worker for worker in workers if worker.chunk]
            if not busy:
                return
            for connection in wait([worker.connection for worker in busy]):
                worker = next(worker for worker in busy if worker.connection is connection)
                try:
                    told = worker.connection.recv()
                except (EOFError, OSError):  # it died
                    code = worker.end()
                    workers.remove(worker)
                    idle_deaths = 0 if worker.begun else idle_deaths + 1  # in a row
                    if idle_deaths == _DEATHS:
                        raise TurboError(
                            f"The process on {devices[worker.place] or 'this machine'} died before it began a video "
                            f"(exit code {code}). Try one job alone with turbo-core generate."
                        ) from None
                    deaths.update(worker.begun)
                    for job in reversed(worker.chunk.values()):
                        if folder.holds(job.name, job.id):
                            tell(Outcome(job, "done", bytes=folder.size(job.name)))
                        elif deaths[job.name] == _DEATHS:
                            tell(Outcome(job, "failed", error=f"its process died {_DEATHS} times (exit code {code})."))
                        else:
                            todo.appendleft(job)
                    continue
                if isinstance(told, str):
                    raise TurboError(told)
                worker.heard(told)
                idle_deaths = idle_deaths if told.state == "begun" else 0
                tell(told)
    finally:
        for worker in workers:
            worker.end()


def settings_at(place: int, devices: list, settings: dict) -> dict:
    """The settings of the pipeline of one process: several on a device divide its memory, all that of the machine."""
    count, memory = devices.count(devices[place]), settings.get("memory")
    more = {"device": devices[place], "sharing": (count, len(devices))}
    return settings | more | {"memory": None if memory is None else memory // count}


class _Worker:
    """The parent's side of a process."""

    def __init__(self, place, settings, folder, options):
        context = multiprocessing.get_context("spawn")
        self.place, self.chunk, self.begun = place, {}, set()
        self.connection, theirs = context.Pipe()
        arguments = theirs, settings, folder, options
        self.process = context.Process(target=_serve, args=arguments, name=f"turbowan {place}", daemon=True)
        self.process.start()
        theirs.close()

    def give(self, jobs):
        self.chunk, self.begun = {job.name: job for job in jobs}, set()
        with suppress(OSError):  # it died while it had nothing to do, which its silence tells
            self.connection.send(jobs)

    def heard(self, outcome):
        if outcome.state == "begun":
            self.begun.add(outcome.job.name)
        else:
            self.chunk.pop(outcome.job.name, None)
            self.begun.discard(outcome.job.name)

    def end(self):
        """End the process and return its exit code."""
        self.connection.close()
        self.process.join(0.2)
        if self.process.is_alive():
            self.process.kill()  # it may sit in a kernel; its part files are swept by the next
        self.process.join()
        return self.process.exitcode


def _serve(connection, settings, folder, options):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair
    threading.Thread(target=_end_with_parent, daemon=True).start()
    alone, faults, device = threading.Lock(), Faults(), str(settings["device"] or "")
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # for libraries that ask for no other

    def tell(outcome):
        with alone:
            connection.send(outcome)

    try:
        with Pipeline(**settings) as pipe:
            while True:
                make(pipe, connection.recv(), folder, tell, faults=faults, **options)
    except TurboError as error:
        tell(str(error))
    except (EOFError, BrokenPipeError):  # the parent is done
        pass


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # another run may begin in this folder
