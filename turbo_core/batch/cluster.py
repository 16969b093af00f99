"""Jobs over many machines by Ray Data: it schedules, scales and tries again; an actor is a pipeline.

A video that an actor had finished before it died is found by what it says of itself and not made again, so a block of
jobs may be tried again. Files and the output folder must be the same paths on every machine.
"""

import json
import logging
import os
import socket
from collections.abc import Callable

from .. import __version__
from ..errors import TurboError, shown
from ..pipeline import Clip, Pipeline
from .jobs import Job
from .making import Faults, Outcome, in_a_line, make
from .remote import folder_of

_DEATHS = 2  # of a block
_BLOCK = 8  # jobs of a block: what is tried again together, and overlaps within


def make_by_ray(
    address: str | None,
    actors: int | None,
    settings: dict,
    jobs: list[Job],
    folder,
    tell: Callable[[Outcome], None],
    **options,
) -> None:
    """Make all jobs on a Ray cluster; address None: a cluster of this machine alone.

    actors: pipelines at work at most, default as many as the cluster takes, each on a GPU of its own, or on a CPU where
    settings name the CPU. options: of making.make. Raises TurboError where Ray is missing or not reached, and where an
    actor finds the models at fault.
    """
    folder = folder_of(folder)
    if folder.of_one_process:
        raise TurboError(f"{folder} is memory of one process, and several make the videos: leave --ray out.")
    ray = _ray()
    _check_reached(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    local = {"include_dashboard": False} if address is None else {}
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="ERROR", **local)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        reason = shown((str(error).splitlines() or [""])[0], 200)
        raise TurboError(f"--ray: {shown(address)} is not reached ({reason}). Is the head running there?") from error
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars, context.max_errored_blocks = False, -1  # a lost block is its own jobs' affair
        on_cpu = settings.get("device") == "cpu"
        each = {"num_cpus": 1} if on_cpu else {"num_gpus": 1}
        kind = "CPU" if on_cpu else "GPU"
        most = max(int(node["Resources"].get(kind, 1)) for node in ray.nodes())
        most = min(most, actors or most, len(jobs))  # on one machine
        settings = settings | {"sharing": (most if on_cpu else 1, most)}
        constants = {"settings": settings, "folder": folder.shared(), "options": options}
        there, free = (int(known.get(kind, 0)) for known in (ray.cluster_resources(), ray.available_resources()))
        left = dict(enumerate(jobs))
        # a process that dies takes its block along: what is left then is tried once more, each job by itself
        # and sent when its actor is free: one that waits for an actor dies with it
        for blocks, sent in ((_blocks(len(jobs), actors or there), None), (len(jobs), 1)):
            if sent == 1 and (scaling := getattr(context, "autoscaling_config", None)):
                scaling.actor_pool_util_upscaling_threshold = 1.0  # all it can be where nothing waits
            blocks = min(blocks, len(left))
            rows = [{"job": json.dumps([number, *job[:-1], job.clip.plain()])} for number, job in left.items()]
            # those that can start do so at once: Ray adds the others one by one
            start = max(1, min(free, actors or free, blocks))
            outcomes = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
                _Maker,
                batch_size=None,
                compute=ray.data.ActorPoolStrategy(
                    min_size=start, max_size=actors or len(jobs), max_tasks_in_flight_per_actor=sent
                ),
                fn_constructor_kwargs=constants | {"version": __version__},
                max_task_retries=_DEATHS - 1,  # else Ray tries a job that kills its process for ever
                **each,
            )
            for row in outcomes.iter_rows():
                found = json.loads(row["outcome"])
                if "fatal" in found:
                    raise TurboError(found["fatal"])
                tell(Outcome(left.pop(found.pop("number")), **found))
            if not left:
                break
        for job in left.values():
            if folder.holds(job.name, job.id):
                tell(Outcome(job, "done", bytes=folder.size(job.name)))
            else:
                tell(Outcome(job, "failed", error=f"its process died {_DEATHS} times, with this job alone."))
    finally:
        ray.shutdown()


def _blocks(jobs: int, actors: int) -> int:
    """Few, for the prompts of each are encoded together, and so many that every actor has work."""
    return min(jobs, max(-(-jobs // _BLOCK), 2 * actors))


class _Maker:
    """An actor: its pipeline, and what it made of a block of jobs."""

    def __init__(self, settings, folder, options, version):
        self.options, self.fatal, self.pipe = options | {"faults": Faults()}, None, None
        if version != __version__:
            self.fatal = f"A machine of the cluster has version {__version__} of this pack, the head has {version}."
            return
        try:
            self.folder = folder_of(folder)
            self.folder.check_shared()
            self.pipe = Pipeline(**settings)
        except Exception as error:  # Ray would start it again without end
            self.fatal = in_a_line(error)

    def __call__(self, block):
        told = []
        if self.fatal is None:
            try:
                rows = (json.loads(row) for row in block["job"])
                self._make([(number, Job(*job, Clip.of_plain(clip))) for number, *job, clip in rows], told)
            except Exception as error:
                self.fatal = in_a_line(error)
        if self.fatal is not None:
            told.append({"fatal": self.fatal})
        return {"outcome": [json.dumps(outcome) for outcome in told]}

    def _make(self, numbered, told):
        number = {job.name: index for index, job in numbered}
        missing = []
        for index, job in numbered:
            if self.folder.holds(job.name, job.id):
                told.append({"number": index, "state": "done", "bytes": self.folder.size(job.name)})
            else:
                missing.append(job)

        def tell(outcome):
            if outcome.state != "begun":
                job, *rest = outcome
                told.append({"number": number[job.name], **dict(zip(Outcome._fields[1:], rest))})

        make(self.pipe, missing, self.folder, tell, **self.options)


def _check_reached(address: str | None) -> None:
    """Raise TurboError where nothing listens at host:port; Ray itself would wait for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return  # "auto", or a form that Ray knows
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise TurboError(f"--ray: {shown(address)} is not reached ({error}). Is the head running there?") from error


def _ray():
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise TurboError(
            'Many machines need Ray. Cure: pip install "comfyui-turbowan[cluster]", or leave --ray out.'
        ) from error
    return ray
