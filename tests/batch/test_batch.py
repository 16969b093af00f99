"""turbo-core batch: the videos of single runs, resumed without doing anything twice, one job's fault its own."""

import argparse
import functools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from tests.helpers.manifests import times_done
from tests.helpers.pipelines import i2v
from turbo_core import checkpoint, pipeline
from turbo_core.batch import Manifest, folder, jobs, making, read_jobs, workers
from turbo_core.cli import batch as cli_batch
from turbo_core.cli import main
from turbo_core.errors import TurboError
from turbo_core.pipeline import Clip
from turbo_core.pipeline.video import read_made, write_video

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = "a red circle\na blue square\nbad \x00 is fine\na red circle that moves\n"
FILES = "TinyWan2.1-T2V.pth", "TinyWan2.1_VAE.pth", "tiny_umt5.safetensors"


def command(tiny, list_of_jobs, output, *more):
    files = [
        item for pair in zip(("--dit", "--vae", "--text-encoder"), (tiny / name for name in FILES)) for item in pair
    ]
    settings = ["--size", "32x32", "--frames", "5", "--steps", "2", "--device", "cpu", "--no-cache"]
    return ["batch", *map(str, [list_of_jobs, "-o", output, *files, *settings, *more])]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPTS)
    return path


def records(folder):
    return [json.loads(line) for line in (folder / "batch.jsonl").read_text().splitlines() if line.strip()]


def made(folder):
    """How often each video was made, by the manifest."""
    return Counter(record["name"] for record in records(folder) if record["state"] == "done")


def test_a_batch_is_the_single_videos_with_their_settings_inside_and_beside(tiny, tmp_path, prompts, capsys):
    out, frames = tmp_path / "out", {}
    assert main(command(tiny, prompts, out)) == 0
    for record in records(out):
        if record["state"] != "done":
            continue
        told = read_made(out / record["name"])
        beside = json.loads((out / record["name"]).with_suffix(".json").read_text())
        assert beside["settings"].items() <= told.items() and told["id"] == record["id"]
        assert told["digitalSourceType"] == "trainedAlgorithmicMedia"
        assert {"sampling", "decode"} <= set(record["seconds"])
        frames[told["prompt"]] = told["seed"]
    assert set(frames) == set(PROMPTS.splitlines())
    assert "videos an hour" in capsys.readouterr().out
    assert not [path for path in out.iterdir() if path.suffix not in (".mp4", ".json", ".jsonl")]


def test_the_frames_are_those_of_generate(tiny, tmp_path, prompts, monkeypatch):
    seen, write = {}, folder.write_video
    monkeypatch.setattr(
        folder, "write_video", lambda path, frames, **made: seen.update({path: frames}) or write(path, frames, **made)
    )
    assert main(command(tiny, prompts, tmp_path / "out")) == 0
    models = jobs.digest_of_models(tiny / n for n in FILES) + "float32"
    found, _ = read_jobs(prompts, Clip("", size=(32, 32), frames=5, steps=2), models)
    assert len(seen) == 4
    for job in found:
        alone = pipeline.generate(
            job.clip.prompt, *(tiny / name for name in FILES), size=(32, 32), frames=5, steps=2, device="cpu"
        )
        assert torch.equal(seen[tmp_path / "out" / job.name], alone.frames)


def test_run_again_only_what_is_missing_changed_or_damaged_is_made(tiny, tmp_path, prompts, capsys):
    out = tmp_path / "out"
    assert main(command(tiny, prompts, out)) == 0
    one, two, *_ = sorted(out.glob("*.mp4"))
    one.unlink()
    two.write_bytes(two.read_bytes()[:-100])
    prompts.write_text(PROMPTS + "a fifth\n")
    assert main(command(tiny, prompts, out)) == 0
    assert "2 of 5 videos are there already" in capsys.readouterr().err
    assert sorted(made(out).values()) == [1, 1, 1, 2, 2]
    assert main(command(tiny, prompts, out, "--seed", 5)) == 0
    assert len(made(out)) == 10
    capsys.readouterr()
    assert main(command(tiny, prompts, out, "--seed", 5)) == 0
    said = capsys.readouterr()
    assert "5 of 5 videos are there already" in said.err and not said.out
    assert sorted(made(out).values()) == [1] * 8 + [2, 2]


@pytest.mark.parametrize("more, message", [(("--frames", 10), "the nearest is 9"), (("--size", "100x32"), "100x32")])
def test_a_setting_that_is_wrong_for_all_lines_is_told_once_and_makes_no_folder(
    tiny, tmp_path, prompts, more, message, capsys
):
    assert main(command(tiny, prompts, tmp_path / "out", *more)) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_check_says_where_tinywan_is_asked_for_more_than_it_knows(tiny, tmp_path, prompts, capsys, monkeypatch):
    monkeypatch.setattr(cli_batch, "told_of_world", lambda model, clip: [f"TinyWan and {clip.prompt}"])
    assert main(command(tiny, prompts, tmp_path / "out", "--check")) == 0
    assert f"{prompts}:2: TinyWan and a blue square" in capsys.readouterr().err


def test_bad_lines_and_failing_jobs_are_told_and_the_rest_is_made(tiny, tmp_path, capsys):
    path, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    rows = [
        '{"prompt": "a"}',
        "{broken",
        '{"prompt": "b", "steps": 101}',
        '{"prompt": "c", "frames": 6}',
        '{"prompt": "d"}',
    ]
    path.write_text("\n".join(rows))
    assert main(command(tiny, path, out)) == 1
    err = capsys.readouterr().err
    assert all(f"jobs.jsonl:{line}: " in err for line in (2, 3, 4)) and "nearest is 5" in err
    states = Counter(record["state"] for record in records(out))
    assert states["done"] == 2 and states["failed"] == 2
    assert len(list(out.glob("*.mp4"))) == 2


def test_check_makes_nothing_and_reads_no_weights(tiny, tmp_path, capsys, monkeypatch):
    path, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    path.write_text('{"prompt": "a"}\n{"prompt": "b", "steps": 101}\nx')
    monkeypatch.setattr(pipeline.experts, "weights", lambda *_: pytest.fail("read the DiT"))
    assert main(command(tiny, path, out, "--check")) == 1
    captured = capsys.readouterr()
    assert "jobs.jsonl:2: " in captured.err and "jobs.jsonl:3: not JSON" in captured.err
    assert "32x32, 5 frames" in captured.out and "1 of 2 jobs" in captured.out and not out.exists()
    assert "lines that are no jobs" in captured.out
    path.write_text('{"prompt": "a"}')
    assert main(command(tiny, path, out, "--check")) == 0


@pytest.mark.parametrize("which", ["--vae", "--vae-fast", "--text-encoder", "--dit"])
def test_a_wrong_model_ends_it_before_anything_is_made(tiny, tmp_path, prompts, which, capsys):
    wrong = tiny / ("TinyWan2.1_VAE.pth" if which == "--dit" else "TinyWan2.1-T2V.pth")
    for more in ([], ["--check"]):
        assert main(command(tiny, prompts, tmp_path / "out", which, wrong, *more)) == 2
        assert wrong.name in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.mp4"))


def test_two_batches_in_one_folder_the_second_names_the_first(tiny, tmp_path, prompts, capsys):
    with Manifest(tmp_path / "out"):
        code = subprocess.run(
            [sys.executable, "-m", "turbo_core", *command(tiny, prompts, tmp_path / "out")],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
    assert code.returncode == 2 and f"process {os.getpid()}" in code.stderr


def test_a_full_disk_ends_the_batch_and_keeps_what_is_done(tiny, tmp_path, prompts, monkeypatch, capsys):
    write, count = folder.write_video, []

    def full(path, frames, **made):
        count.append(path)
        if len(count) > 1:
            raise TurboError("Could not write it (No space left on device).")
        write(path, frames, **made)

    monkeypatch.setattr(folder, "write_video", full)
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert main(command(tiny, prompts, tmp_path / "out")) == 2
    assert "Free space and start again" in capsys.readouterr().err
    assert len(count) == 2 and sum(made(tmp_path / "out").values()) == 1


def test_a_video_whose_process_was_killed_before_it_was_entered_is_not_made_again(tiny, tmp_path, prompts):
    out = tmp_path / "out"
    assert main(command(tiny, prompts, out)) == 0
    lines = [line for line in (out / "batch.jsonl").read_text().splitlines(True) if line.strip()]
    kept = [line for line in lines if json.loads(line)["state"] != "done"]
    (out / "batch.jsonl").write_text("".join(kept) + lines[-1][:40])  # and its last line is torn
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    assert main(command(tiny, prompts, out)) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    done = [json.loads(line) for line in (out / "batch.jsonl").read_text().splitlines() if line.endswith("}")]
    assert sum(record["state"] == "done" for record in done) == 4


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


@pytest.mark.parametrize("more", [["--dtype", "bfloat16"], ["--tokenizer"]])
def test_another_type_or_tokenizer_makes_other_videos(tiny, tmp_path, more):
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("a red circle")
    if more == ["--tokenizer"]:
        raw = bytes(safetensors.torch.load_file(tiny / FILES[2])["spiece_model"].tolist())
        (tmp_path / "spiece.model").write_bytes(raw)
        more = ["--tokenizer", tmp_path]
    for settings in ([], more, more):
        assert main(command(tiny, prompts, out, *settings)) == 0
    assert sorted(made(out).values()) == [1, 1]


def test_another_model_in_the_same_folder_makes_other_videos(tiny, tmp_path):
    """A folder has no size of its own, and the index of two models of one kind is the same."""
    out, prompts, folder = tmp_path / "out", tmp_path / "prompts.txt", tmp_path / "model"
    prompts.write_text("a red circle")
    folder.mkdir()
    state = {name: t.contiguous() for name, t in checkpoint.load(tiny / FILES[0])[0].items()}
    for scale in (1, 1, 2):
        state["head.head.weight"] = state["head.head.weight"] * scale
        names = sorted(state)
        halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
        for file, part in halves.items():
            safetensors.torch.save_file({name: state[name] for name in part}, folder / file)
        index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert main(command(tiny, prompts, out, "--dit", folder)) == 0
    assert sorted(made(out).values()) == [1, 1]


def test_the_type_that_is_the_default_makes_the_same_videos(tiny, tmp_path):
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("a red circle")
    for settings in ([], ["--dtype", "float32"]):
        assert main(command(tiny, prompts, out, *settings)) == 0
    assert list(made(out).values()) == [1]


def test_a_file_that_no_batch_made_is_left_alone(tiny, tmp_path, capsys):
    out, prompts = tmp_path / "out", tmp_path / "prompts.csv"
    out.mkdir()
    prompts.write_text("prompt,name\na red circle,holiday\na blue square,mine\n")
    (out / "holiday.mp4").write_bytes(b"the only copy")
    for _ in range(2):
        assert main(command(tiny, prompts, out)) == 1
        assert (
            "prompts.csv:2: holiday.mp4 is in" in (said := capsys.readouterr().err)
            and "it is no clip of a batch" in said
        )
        assert (out / "holiday.mp4").read_bytes() == b"the only copy"
    assert list(made(out)) == ["mine.mp4"]
    (out / "batch.jsonl").unlink()
    (out / "mine.mp4").write_bytes((out / "mine.mp4").read_bytes()[:-9])  # ours, by what lies beside
    (out / "holiday.mp4").unlink()
    assert main(command(tiny, prompts, out)) == 0


def test_a_clip_of_generate_and_settings_without_a_video_are_left_alone(tiny, tmp_path, prompts):
    out, others = tmp_path / "out", tmp_path / "others"
    assert main(command(tiny, prompts, others)) == 0
    first, second, third, fourth = (record["name"] for record in records(others) if record["state"] == "done")
    out.mkdir()
    beside = (others / first).with_suffix(".json")
    made_by_hand = read_made(others / first)
    del made_by_hand["id"]
    write_video(
        out / first, torch.zeros(5, 32, 32, 3, dtype=torch.uint8), made=made_by_hand
    )  # as turbo-core generate does
    (out / second).with_suffix(".json").write_text('{"notes": "of a person"}')
    shutil.copy(others / third, out)  # of another batch, its settings somebody's
    (out / third).with_suffix(".json").write_text('{"notes": "of a person"}')
    shutil.copy(beside, (out / fourth).with_suffix(".json"))  # of a batch that was killed before its video was there
    manifest = Manifest(out)
    assert [manifest.folder.is_foreign(name) for name in (first, second, third, fourth)] == [
        True,
        True,
        True,
        False,
    ]
    mine = {path: path.read_bytes() for path in out.iterdir() if fourth.split(".")[0] not in path.name}
    assert main(command(tiny, prompts, out)) == 1
    assert all(path.read_bytes() == content for path, content in mine.items())
    assert (out / fourth).is_file() and (out / fourth).with_suffix(".json").is_file()


def test_a_file_that_took_the_place_of_a_clip_is_left_alone_whatever_the_journal_says(tiny, tmp_path, capsys):
    out, listed = tmp_path / "out", tmp_path / "jobs.jsonl"
    rows = [{"prompt": f"a red circle {i}", "name": name} for i, name in enumerate(("fox", "cat", "cut", "bad"))]
    listed.write_text("\n".join(map(json.dumps, [*rows[:3], rows[3] | {"topk": 3}])))
    assert main(command(tiny, listed, out)) == 1
    by_hand = read_made(out / "fox.mp4")
    del by_hand["id"]
    write_video(out / "fox.mp4", torch.zeros(5, 32, 32, 3, dtype=torch.uint8), made=by_hand)  # by turbo-core generate
    (out / "cat.mp4").write_text("of a person")
    (out / "cut.mp4").write_bytes((out / "cut.mp4").read_bytes()[:300])  # by a full disk
    (out / "bad.mp4").write_text("of a person")
    (out / "bad.json").write_text('{"notes": "of a person"}')
    listed.write_text("\n".join(map(json.dumps, rows)))
    mine = {
        path: path.read_bytes() for path in out.iterdir() if path.name in ("fox.mp4", "cat.mp4", "bad.mp4", "bad.json")
    }
    for more in ([], ["--check"]):
        capsys.readouterr()
        assert main(command(tiny, listed, out, *more)) == 1
        said = capsys.readouterr().err
        assert [name for name in ("fox", "cat", "cut", "bad") if f"{name}.mp4 is in" in said] == ["fox", "cat", "bad"]
        assert all(path.read_bytes() == content for path, content in mine.items())
    assert read_made(out / "cut.mp4")["prompt"] == "a red circle 2"


def test_a_picture_replaced_in_a_batch_is_its_own_clips_fault(tiny, tmp_path, monkeypatch):
    shutil.copy(tiny / "image.png", tmp_path / "frame.png")
    jobs_file = tmp_path / "jobs.jsonl"
    jobs_file.write_text('{"prompt": "a", "image": "frame.png", "size": "32x32", "frames": 5, "steps": 1}')
    found, _ = jobs.read_jobs(jobs_file, Clip(""))
    Image.new("RGB", (32, 32), "green").save(tmp_path / "frame.png")
    told = []
    with i2v(tiny) as pipe:
        making.make(pipe, found, tmp_path / "out", told.append)
    assert [outcome.state for outcome in told] == ["failed"] and "frame.png has changed since" in told[0].error


def test_a_journal_of_another_person_is_told(tiny, tmp_path, prompts, monkeypatch, capsys):
    def refused(target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folder, "alone", refused)
    assert main(command(tiny, prompts, tmp_path / "out")) == 2
    assert "batch.jsonl cannot be written (Permission denied). Check whose it is" in capsys.readouterr().err


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
