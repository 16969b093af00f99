"""turbo-core batch in processes that are killed, or die: everything is made, once, and who kills them is told."""

import argparse
import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.batches import FILES, command
from tests.helpers.manifests import times_done
from turbo_core.batch import jobs, making, workers
from turbo_core.cli import batch as cli_batch
from turbo_core.cli import main
from turbo_core.errors import TurboError
from turbo_core.pipeline import Clip
from turbo_core.pipeline.video import read_made

ROOT = Path(__file__).resolve().parents[2]


def start(tiny, prompts, out, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "turbo_core", *command(tiny, prompts, out, *more)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_killed_at_any_moment_it_is_resumed_to_the_end(tiny, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("\n".join(f"prompt {number}" for number in range(12)))
    for pause in (0.0, 0.15, 0.4):
        process = start(tiny, prompts, out)
        before = len(list(out.glob("*.mp4"))) if out.exists() else 0
        until(lambda before=before: len(list(out.glob("*.mp4"))) > before)
        time.sleep(pause)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert main(command(tiny, prompts, out)) == 0
    assert len(list(out.glob("*.mp4"))) == len(list(out.glob("*.json"))) == 12
    assert set(made_twice(out)) == set()
    assert all(read_made(path) for path in out.glob("*.mp4"))
    assert not list(out.glob("*.part")) and not list(out.glob(".*"))


def made_twice(out):
    """Videos that the manifest has not exactly once."""
    return [name for name, count in times_done(out).items() if count != 1]


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX's")
def test_two_processes_share_the_jobs_and_one_that_dies_gives_its_own_back(tiny, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("\n".join(f"prompt {number}" for number in range(10)))
    process = start(tiny, prompts, out, "--workers", 2)
    until(lambda: out.exists() and len(list(out.glob("*.mp4"))) > 1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    workers = [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(int(workers[0]), signal.SIGKILL)
    assert process.wait(timeout=200) == 0, process.stderr.read()
    assert len(list(out.glob("*.mp4"))) == 10 and made_twice(out) == []
    assert not list(out.glob("*.part"))


def test_a_job_that_kills_its_process_twice_is_failed_and_the_rest_is_made(tiny, tmp_path):
    """The networks take turns, so that three are in work together, and two of them are innocent. One more ends in an
    error that nobody foresaw."""
    script = f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from turbo_core.batch import workers, making, jobs
from turbo_core.pipeline import Clip, resident, residence

if __name__ == "__main__" or True:
    begun = resident.Pipeline._begun
    def deadly(self, work, stay):
        self._tell_begun(work.ready.clip)
        if work.clip.seed == 1:
            os._exit(9)
        if work.clip.seed == 4:
            raise RuntimeError("boom")
        return begun(self, work, stay)
    resident.Pipeline._begun = deadly
    resident.what_stays = lambda *_: residence.Stay()
if __name__ == "__main__":
    files = dict(zip(("dit", "vae", "text_encoder"), {[str(tiny / name) for name in FILES]!r}))
    clips = [Clip(f"p{{n}}", n, size=(32, 32), frames=5, steps=1) for n in range(6)]
    listed = [jobs.Job(n, f"{{n}}.mp4", str(n), None, clip) for n, clip in enumerate(clips)]
    told = []
    workers.make_by_workers(["cpu"], files, listed, {str(tmp_path)!r}, told.append)
    print(sorted((o.job.name, o.state, (o.error or "")[:22]) for o in told if o.state != "begun"))
"""
    (tmp_path / "deadly.py").write_text(script)
    done = subprocess.run([sys.executable, tmp_path / "deadly.py"], capture_output=True, text=True, timeout=300)
    expected = [(f"{n}.mp4", "done", "") for n in range(6)]
    expected[1] = ("1.mp4", "failed", "its process died 2 tim")
    expected[4] = ("4.mp4", "failed", "RuntimeError: boom")
    assert done.stdout.strip().splitlines()[-1:] == [str(expected)], done.stderr


def test_a_process_that_died_while_it_had_nothing_to_do_is_found_when_it_gets_jobs(tmp_path):
    worker = workers._Worker(0, {}, tmp_path, {})
    try:
        worker.process.kill()
        worker.process.join()
        worker.give([jobs.Job(1, "a.mp4", "id", None, Clip("a"))])
        with pytest.raises((EOFError, OSError)):  # as the loop expects it of a dead one
            worker.connection.recv()
    finally:
        assert worker.end() not in (None, 0)


class _Fragile(workers._Worker):
    """Makes so many videos of those it is given, and dies between two of them."""

    makes = 1

    def __init__(self, place, *_):
        self.place, self.chunk, self.begun = place, {}, set()
        self.connection, self.theirs = multiprocessing.Pipe()

    def give(self, jobs):
        self.chunk = {job.name: job for job in jobs}
        for job in jobs[: self.makes]:
            self.theirs.send(making.Outcome(job, "begun"))
            self.theirs.send(making.Outcome(job, "done", bytes=1))
        if self.makes < len(jobs):
            self.theirs.close()

    def end(self):
        self.connection.close()
        return 9


@pytest.mark.parametrize("makes", [1, 0])
def test_processes_that_die_between_videos_end_a_batch_only_where_none_is_made(tmp_path, monkeypatch, makes):
    monkeypatch.setattr(workers, "_Worker", _Fragile)
    monkeypatch.setattr(_Fragile, "makes", makes)
    listed, told = [jobs.Job(n, f"{n}.mp4", str(n), None, Clip("a")) for n in range(12)], []
    run = functools.partial(workers.make_by_workers, ["cpu"], {}, listed, tmp_path, told.append)
    if makes:
        run()
        assert sorted(o.job.line for o in told if o.state == "done") == list(range(12))
    else:
        with pytest.raises(TurboError, match=r"died before it began a video \(exit code 9\)"):
            run()


def test_cuda_without_a_number_is_every_card_where_processes_are_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for device, count, expected in (
        ("cuda", 2, ["cuda:0", "cuda:1"]),
        (None, None, [f"cuda:{index}" for index in range(4)]),
        ("cuda", None, ["cuda"]),
        ("cuda:3", 2, ["cuda:3"] * 2),
    ):
        asked = argparse.Namespace(device=device, workers=count, parallel=None, ray=None)
        assert cli_batch._devices(asked) == expected
