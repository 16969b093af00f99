"""The verb batch of turbo-core: a list of prompts to a folder of videos, resumed where it ended."""

import sys
import time
from collections import Counter
from pathlib import Path

from ..errors import TurboError
from .generate import add_models, add_settings, clip_of, models_of, signer_of, tell_of_steps, told_of_world
from .processes import add_parallel, in_team


def add_verbs(verbs, common) -> None:
    """Add batch to the parser's verbs; common: the parent parser with what all verbs take."""
    command = verbs.add_parser("batch", parents=[common], help="many videos from a list, models read once, resumable")
    add = command.add_argument
    add("jobs", type=Path, metavar="JOBS", help="prompts, one a line; .csv, .tsv, .jsonl: columns prompt, seed ...")
    add("-o", "--output", required=True, metavar="DIR", help="folder of the videos, or s3://...; run again to go on")
    add_models(command)
    add_settings(command)
    add("--check", action="store_true", help="check every line, file and the memory, and make nothing")
    add("--memory", type=float, metavar="GIB", help="that the models may take of a device; default what is free")
    add("--workers", type=int, metavar="N", help="processes; default one for each CUDA device, else one")
    add("--ray", nargs="?", const="local", metavar="ADDRESS", help="many machines: a Ray cluster; default a local one")
    add_parallel(command)
    cache = command.add_mutually_exclusive_group()
    cache.add_argument("--cache", type=Path, metavar="DIR", help="where embeddings of prompts are kept")
    cache.add_argument("--no-cache", action="store_true", help="keep no embeddings on disk")
    command.set_defaults(run=run_batch)


def run_batch(arguments) -> int:
    """0 when every job is done, 1 when some are not."""
    return in_team(arguments, lambda team: _run(arguments, team) if team.first else _follow(arguments, team))


def _follow(arguments, team) -> int:
    """All that processes but the first do."""
    from ..batch.making import follow
    from ..pipeline import Pipeline

    if team.told(None):
        with Pipeline(**_settings(arguments), team=team) as pipe:
            follow(pipe)
    return 0


def _run(arguments, team) -> int:
    from ..batch import Manifest, read_jobs
    from ..batch.jobs import by_lora, digest_of_models
    from ..batch.making import sign_unsigned
    from ..checkpoint import files_of
    from ..devices import default_dtype, pick_device
    from ..pipeline.embeddings import tokenizer_files
    from ..pipeline.sizes import check_frames, check_size

    settings, clip = _settings(arguments), clip_of(arguments)
    check_frames(clip.frames)  # what is wrong in all lines is told once
    if not clip.adaptive:
        check_size(*clip.size)
    signer = signer_of(arguments)  # a wrong certificate is told now
    paths = [file for path in (arguments.dit, arguments.dit_low) if path for file in files_of(path)]
    paths += [arguments.vae, arguments.text_encoder, *tokenizer_files(arguments.tokenizer, arguments.text_encoder)]
    paths += [arguments.vae_fast] if arguments.vae_fast else []
    dtype = arguments.dtype or str(default_dtype(pick_device(arguments.device))).removeprefix("torch.")
    models = digest_of_models(paths) + dtype
    jobs, faults = read_jobs(arguments.jobs, clip, models)
    if arguments.check:
        team.told(lambda: 0)
        return _check(arguments, settings, jobs, faults, team)
    _tell_faults(arguments.jobs, faults)
    tell_of_steps(job.clip for job in jobs)
    with Manifest(arguments.output) as manifest:
        done = [job for job in jobs if manifest.is_done(job)]
        there = {job.name for job in done}
        others = {
            job.name: _in_the_way(job, manifest.folder)
            for job in jobs
            if job.name not in there and manifest.is_foreign(job)
        }
        _tell_faults(arguments.jobs, others.values())
        faults += others.values()
        todo = by_lora([job for job in jobs if job.name not in there | others.keys()])
        if done:
            print(f"{len(done)} of {len(jobs)} videos are there already.", file=sys.stderr)
        if signer and done and manifest.folder.signs_later:
            print(f"{sign_unsigned(signer, done, manifest)} of them were unsigned and are signed now.", file=sys.stderr)
        elif signer and done:
            print("They stay as they are: --sign signs what is made from now on.", file=sys.stderr)
        tally = _Tally(arguments.jobs, manifest)
        try:
            if team.told(lambda: len(todo)):
                _make(arguments, settings, todo, manifest, tally, team)
        finally:
            if todo:
                tally.show(len(todo), len(faults))
    return int(bool(faults) or tally.count["done"] < len(todo))


def _make(arguments, settings, todo, manifest, tally, team):
    from ..batch.cluster import make_by_ray
    from ..batch.making import make
    from ..batch.workers import make_by_workers
    from ..pipeline import Pipeline
    from .console import progress_bars

    with progress_bars(remaining=True) as progress:

        def tell(outcome):
            tally.add(outcome)
            if outcome.state != "begun":
                progress("videos", tally.finished(), len(todo))

        progress("videos", 0, len(todo))
        options = {"metadata": not arguments.no_metadata, "sign": arguments.sign}
        devices = _devices(arguments)
        if arguments.ray is not None:
            address = None if arguments.ray == "local" else arguments.ray
            make_by_ray(address, _count(arguments), settings, todo, manifest.folder, tell, **options)
        elif len(devices) == 1:
            with Pipeline(**settings, progress=progress, team=team) as pipe:
                make(pipe, todo, manifest.folder, tell, **options)
        else:
            shared = {name: value for name, value in settings.items() if name != "device"}
            make_by_workers(devices, shared, todo, manifest.folder, tell, **options)


def _settings(arguments) -> dict:
    """The arguments of pipeline.Pipeline."""
    from ..pipeline.embeddings import cache_folder

    if arguments.memory is not None and not 0 <= arguments.memory < 1 << 20:
        raise TurboError(f"--memory is GiB for the models, got {arguments.memory:g}.")
    memory = None if arguments.memory is None else int(arguments.memory * 2**30)
    cache = None if arguments.no_cache else arguments.cache or cache_folder()
    return models_of(arguments) | {"memory": memory, "cache": cache}


def _count(arguments) -> int | None:
    if arguments.workers is not None and not 1 <= arguments.workers <= 10_000:
        raise TurboError(f"--workers is a number of processes, 1 to 10,000, got {arguments.workers}.")
    return arguments.workers


def _devices(arguments) -> list:
    import torch

    count = _count(arguments)
    if arguments.parallel:
        if count is not None or arguments.ray is not None:
            raise TurboError("--workers, --ray make a clip in each process, --parallel one in all: choose one of them.")
        return [arguments.device]
    if arguments.ray is not None:
        return []
    all_of_them = arguments.device is None or (arguments.device == "cuda" and count is not None)
    if all_of_them and torch.cuda.is_available():
        cards = torch.cuda.device_count()
        if count is not None and count > cards:
            raise TurboError(f"--workers {count}, but there are {cards} CUDA devices. Expected at most as many.")
        return [f"cuda:{index}" for index in range(count or cards)]
    return [arguments.device] * (count or 1)


def _check(arguments, settings, jobs, faults, team) -> int:
    """Hold every job to the models without reading them, look at devices and the folder, and say what will stay in
    memory."""
    from ..batch.checking import about_devices, about_folder
    from ..batch.jobs import Fault
    from ..batch.remote import folder_of
    from ..batch.workers import settings_at
    from ..pipeline import Pipeline
    from ..pipeline.text import load_text_encoder
    from .console import progress_bars, table

    bad, hints, rooms, pixels, folder = [*faults], [], Counter(), 0, folder_of(arguments.output)
    devices = _devices(arguments)
    about = about_devices(devices)
    if len(devices) > 1:
        settings = settings_at(0, devices, settings)
    with Pipeline(**(settings | {"cache": None})) as pipe, progress_bars() as progress:
        pipe.coders.load("meta", pipe.dtype)
        load_text_encoder(settings["text_encoder"], settings["tokenizer"], "meta", pipe.dtype)
        for number, job in enumerate(jobs):
            progress("check", number, len(jobs))
            try:
                ready = pipe.check(job.clip)
                team.check(pipe.model.num_heads, ready.tokens)
                pixels += ready.size[0] * ready.size[1] * job.clip.frames
                rooms["{}x{}".format(*ready.size), job.clip.frames, pipe.stay(ready)] += 1
                if folder.is_foreign(job.name):
                    bad.append(_in_the_way(job, folder))
                hints += (Fault(job.line, told) for told in told_of_world(pipe.model, job.clip))
            except TurboError as error:
                bad.append((job.line, str(error)))
        progress("check", len(jobs), len(jobs))
    _tell_faults(arguments.jobs, sorted([*bad, *hints]))
    about += about_folder(arguments.output, pixels)
    rows = [
        (f"{size}, {frames} frames", f"{count} of {len(jobs)} jobs", stay.words(pipe.experts.waits))
        for (size, frames, stay), count in rooms.items()
    ]
    rows = rows or [("no video can be made", "", "")]
    if faults:
        rows.append(("lines that are no jobs", str(len({line for line, _ in faults})), "told above"))
    table("Planned by count of bytes, not measured", [*rows, *about])
    return int(bool(bad))


def _in_the_way(job, folder):
    from ..batch.jobs import Fault

    return Fault(job.line, f"{job.name} is in {folder} already, and it is no clip of a batch. Rename one.")


def _tell_faults(path, faults) -> None:
    for line, error in faults:
        print(f"{path}:{line}: {error}", file=sys.stderr)


class _Tally:
    """What became of the jobs, in the manifest and in numbers."""

    def __init__(self, path, manifest):
        self.path, self.manifest = path, manifest
        self.count, self.seconds, self.start = Counter(), Counter(), time.perf_counter()

    def add(self, outcome):
        """Enter an event."""
        job, more = outcome.job, {}
        if outcome.state == "failed":
            more = {"error": outcome.error}
            print(f"{self.path}:{job.line}: {job.name}: {outcome.error}", file=sys.stderr)
        elif outcome.state == "done":
            more = {"bytes": outcome.bytes, "seconds": outcome.seconds}
            self.seconds.update(outcome.seconds or {})
        self.manifest.record(job, outcome.state, **more)
        self.count[outcome.state] += 1

    def finished(self) -> int:
        """Jobs that are over."""
        return self.count["done"] + self.count["failed"]

    def show(self, wanted: int, faults: int) -> None:
        """The summary on stdout."""
        from .console import table

        took = time.perf_counter() - self.start
        rows = [("made", f"{self.count['done']} of {wanted}"), ("failed", str(self.count["failed"]))]
        if faults:
            rows.append(("lines that are no jobs", f"{faults}, told above"))
        if self.count["done"]:
            rows.append(("videos an hour", f"{3600 * self.count['done'] / took:.0f}"))
        rows += [(f"time: {stage}", f"{seconds:.1f} s") for stage, seconds in self.seconds.items()]
        rows.append(("time: all, stages side by side", f"{took:.1f} s"))
        table(str(self.manifest.folder), rows)
