"""Jobs through a pipeline to files: a video and its settings beside it."""

import time
from collections.abc import Callable
from typing import NamedTuple

from ..errors import TurboError, shown
from ..files import digest
from ..pipeline import Clip, Pipeline
from ..pipeline.provenance import Signer
from .jobs import Job
from .remote import folder_of

LEAST_FREE = 64 << 20  # bytes; a disk with less takes no more videos
_ALIKE = 3  # faults of ours of one kind in a row that end a batch


class Outcome(NamedTuple):
    """An event of a job: state is begun, done or failed; seconds by stage."""

    job: Job
    state: str
    error: str | None = None
    bytes: int = 0
    seconds: dict | None = None


class DiskFull(TurboError):
    """The videos after this one would not be written either."""


class Faults:
    """Counts faults that are no TurboError, of one kind in a row: what broke may be the machine and not a job."""

    def __init__(self):
        self._kind, self._count = None, 0

    def done(self) -> None:
        """A video was made."""
        self.__init__()

    def add(self, error: Exception) -> None:
        """Raises TurboError at the third in a row."""
        kind = type(error).__name__
        self._count = self._count + 1 if kind == self._kind else 1
        self._kind = kind
        if self._count == _ALIKE:
            raise TurboError(
                f"{_ALIKE} videos in a row failed alike ({in_a_line(error)}), and the rest would. Try one of them by "
                "turbo-core generate --debug, which shows where; then start again: what is done stays."
            ) from error


def make(
    pipe: Pipeline,
    jobs: list[Job],
    folder,
    tell: Callable[[Outcome], None],
    metadata: bool = True,
    sign=None,
    faults: Faults | None = None,
) -> None:
    """Make all jobs; tell takes each event, and may be called from a second thread.

    metadata: keep settings inside the videos too. sign: paths of a certificate and its key. faults: of the calls
    before this one. A job that fails is told and the rest goes on; with a team of processes only one that does not fit,
    what fails later ends all. Raises DiskFull, and TurboError where a file of the models is at fault, or faults of ours
    have no end.
    """
    folder, of, faults = folder_of(folder), {id(job.clip): job for job in jobs}, faults or Faults()
    signer = Signer(*sign) if sign else None

    def write(clip, result):
        job, start = of[id(clip)], time.perf_counter()
        beside = {"output": job.name, "settings": result.settings | {"id": job.id}}
        beside |= {"seconds": result.seconds, "step_seconds": result.step_seconds}
        size = folder.write(job.name, result.frames, beside, metadata, signer)
        faults.done()
        tell(Outcome(job, "done", bytes=size, seconds=result.seconds | {"write": time.perf_counter() - start}))

    def failed(clip, error):
        if folder.free() < LEAST_FREE:
            raise DiskFull(f"The disk of {folder} is full ({error}) Free space and start again: what is done stays.")
        tell(Outcome(of[id(clip)], "failed", error=in_a_line(error)))
        if not isinstance(error, TurboError):
            faults.add(error)

    def begun(clip):
        job = of[id(clip)]
        if job.picture is not None and digest([clip.image]) != job.picture:  # it would be kept as that of the old one
            raise TurboError(f"{clip.image} has changed since this batch began. Start it again.")
        tell(Outcome(job, "begun"))

    clips, alone = [job.clip for job in jobs], pipe.team.size == 1
    if not alone:
        clips = [clip for clip in clips if _fits(pipe, clip, failed)]
        pipe.team.told(lambda: [clip.plain() for clip in clips])
    for _ in pipe.map(clips, write, failed if alone else None, begun):
        pass


def in_a_line(error: Exception) -> str:
    """What a person is told of an error of any kind."""
    if isinstance(error, TurboError):
        return str(error)
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {shown(first, 200)}"


def sign_unsigned(signer: Signer, jobs: list[Job], manifest) -> int:
    """Put credentials into those of the finished jobs that have none; how many that were."""
    signed = 0
    for job in jobs:
        size = manifest.folder.sign(job.name, signer)
        if size is not None:
            manifest.record(job, "done", bytes=size)
            signed += 1
    return signed


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
