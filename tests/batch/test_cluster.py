"""A Ray cluster of this machine: every job made once, also when an actor is killed in the middle."""

import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.batches import FILES
from turbo_core.batch import cluster
from turbo_core.batch.cluster import make_by_ray
from turbo_core.batch.jobs import Job
from turbo_core.errors import TurboError
from turbo_core.pipeline import Clip
from turbo_core.pipeline.video import read_made

pytest.importorskip("ray")
SMALL = {"size": (32, 32), "frames": 5, "steps": 2}


def listed(count):
    return [Job(n, f"{n}.mp4", f"id{n}", None, Clip(f"prompt {n}", n, **SMALL)) for n in range(count)]


def settings(tiny, **more):
    return dict(zip(("dit", "vae", "text_encoder"), (str(tiny / name) for name in FILES))) | {"device": "cpu"} | more


def actors():
    """The processes of our actors on this machine."""
    found = subprocess.run(["pgrep", "-f", "^ray::MapWorker"], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


@pytest.mark.slow
def test_an_actor_that_is_killed_loses_nothing_and_nothing_is_made_twice(tiny, tmp_path):
    jobs, told, killed, made = listed(24), [], [], {}

    def kill():
        while len(list(tmp_path.glob("*.mp4"))) < 2:
            time.sleep(0.05)
        made.update({path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.mp4")})
        killed.append(actors()[0])
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    make_by_ray(None, 2, settings(tiny), jobs, tmp_path, told.append)
    thread.join(5)
    assert killed and len(made) >= 2
    assert all((tmp_path / name).stat().st_mtime_ns == at for name, at in made.items())
    assert Counter(outcome.job.name for outcome in told) == Counter(job.name for job in jobs)
    assert all(outcome.state == "done" for outcome in told)
    assert all(read_made(tmp_path / job.name)["id"] == job.id for job in jobs)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
def test_as_many_actors_as_the_cluster_takes_share_blocks_of_several_jobs(tiny, tmp_path, monkeypatch):
    """A block for each job would have the text encoder read for each."""
    seen, blocks, told = [], cluster._blocks, []
    monkeypatch.setattr(cluster, "_blocks", lambda *counts: seen.append((counts, blocks(*counts))) or seen[-1][1])
    make_by_ray(None, None, settings(tiny), listed(8), tmp_path, told.append)
    assert seen == [((8, os.cpu_count()), min(8, 2 * os.cpu_count()))]
    assert [blocks(10_000, actors) for actors in (0, 64, 6_000)] == [1_250, 1_250, 10_000]
    assert Counter(outcome.state for outcome in told) == {"done": 8}


@pytest.mark.slow
def test_a_job_that_kills_its_process_is_failed_and_the_others_of_its_block_are_made(tiny, tmp_path, monkeypatch):
    """Ray itself would start the process again for ever; and on a busy machine those that waited for the actor died
    with it twice, and were told to have done it."""

    class Deadly(cluster._Maker):
        def __call__(self, block):
            if any(json.loads(row)[2] == "1.mp4" for row in block["job"]):
                time.sleep(2)  # until the next ones wait
                os._exit(9)
            return super().__call__(block)

    monkeypatch.setattr(cluster, "_Maker", Deadly)
    told = []
    make_by_ray(None, 1, settings(tiny), listed(4), tmp_path, told.append)
    states = {outcome.job.name: outcome.state for outcome in told}
    assert len(told) == 4 and states == {"0.mp4": "done", "1.mp4": "failed", "2.mp4": "done", "3.mp4": "done"}
    assert "died 2 times, with this job alone" in next(outcome.error for outcome in told if outcome.error)


@pytest.mark.slow
def test_faults_of_jobs_and_of_models_come_back(tiny, tmp_path):
    lora = tmp_path / "lora.safetensors"
    save_file({f"blocks.0.self_attn.q.lora_{part}.weight": torch.ones(256, 256) for part in "AB"}, lora)
    jobs, told = listed(3), []
    jobs[0] = jobs[0]._replace(clip=replace(jobs[0].clip, lora=[f"{lora}:0.5"]))
    jobs[1] = jobs[1]._replace(clip=Clip("x", frames=6, size=(32, 32)))
    make_by_ray(None, 1, settings(tiny), jobs, tmp_path, told.append)
    assert sorted((outcome.job.name, outcome.state) for outcome in told) == [
        ("0.mp4", "done"), ("1.mp4", "failed"), ("2.mp4", "done"),
    ]  # fmt: skip
    assert read_made(tmp_path / "0.mp4")["lora"][0]["strength"] == 0.5
    assert "nearest is 5" in next(outcome.error for outcome in told if outcome.error)
    with pytest.raises(TurboError, match=r"tiny_umt5\.safetensors"):
        make_by_ray(None, 1, settings(tiny, dit=str(tiny / FILES[2])), jobs, tmp_path, told.append)


def test_a_head_that_is_not_there_is_named(tiny, tmp_path):
    with pytest.raises(TurboError, match=r"127\.0\.0\.1:1 is not reached"):
        make_by_ray("127.0.0.1:1", 1, settings(tiny), listed(1), Path(tmp_path), print)
