"""Jobs through a pipeline to files: a video and its settings beside it."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..errors import TurboError
from ..files import write_whole
from ..pipeline import Clip, Pipeline
from ..pipeline.provenance import Signer
from ..pipeline.video import write_video
from .jobs import Job

_LEAST_FREE = 64 << 20  # bytes; a disk with less takes no more videos


class Outcome(NamedTuple):
    """An event of a job: state is begun, done or failed; seconds by stage."""

    job: Job
    state: str
    error: str | None = None
    bytes: int = 0
    seconds: dict | None = None


class DiskFull(TurboError):
    """The videos after this one would not be written either."""


def make(
    pipe: Pipeline, jobs: list[Job], folder, tell: Callable[[Outcome], None], metadata: bool = True, sign=None
) -> None:
    """Make all jobs; tell takes each event, and may be called from a second thread.

    metadata: keep settings inside the videos too. sign: paths of a certificate and its key. A job that fails is told
    and the rest goes on; with a team of processes only one that does not fit, what fails later ends all. Raises
    DiskFull, and TurboError where a file of the models is at fault.
    """
    folder, of = Path(folder), {id(job.clip): job for job in jobs}
    finish = Signer(*sign).sign if sign else None

    def write(clip, result):
        job, start = of[id(clip)], time.perf_counter()
        place, made = folder / job.name, result.settings | {"id": job.id}
        beside = {"output": job.name, "settings": made, "seconds": result.seconds, "step_seconds": result.step_seconds}
        # the video last: where it is, all is there
        write_whole(place.with_suffix(".json"), json.dumps(beside, indent=2, ensure_ascii=False) + "\n")
        write_video(place, result.frames, made=made if metadata else None, finish=finish)
        seconds = result.seconds | {"write": time.perf_counter() - start}
        tell(Outcome(job, "done", bytes=os.path.getsize(place), seconds=seconds))

    def failed(clip, error):
        if shutil.disk_usage(folder).free < _LEAST_FREE:
            raise DiskFull(f"The disk of {folder} is full ({error}) Free space and start again: what is done stays.")
        tell(Outcome(of[id(clip)], "failed", error=str(error)))

    clips, alone = [job.clip for job in jobs], pipe.team.size == 1
    if not alone:
        clips = [clip for clip in clips if _fits(pipe, clip, failed)]
        pipe.team.told(lambda: [clip.plain() for clip in clips])
    for _ in pipe.map(clips, write, failed if alone else None, lambda clip: tell(Outcome(of[id(clip)], "begun"))):
        pass


def follow(pipe: Pipeline) -> None:
    """What the other processes of a team do while the first one makes jobs."""
    for _ in pipe.map([Clip.of_plain(fields) for fields in pipe.team.told(None)]):
        pass


def _fits(pipe, clip, failed) -> bool:
    try:
        pipe.check(clip)
        return True
    except TurboError as error:
        failed(clip, error)
        return False
