"""turbo-core batch: the videos of single runs, resumed without doing anything twice, one job's fault its own."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from tests.helpers.batches import FILES, PROMPTS, command, made, records
from tests.helpers.pipelines import i2v
from turbo_core import checkpoint, pipeline
from turbo_core.batch import Manifest, folder, jobs, making, read_jobs
from turbo_core.cli import batch as cli_batch
from turbo_core.cli import main
from turbo_core.errors import TurboError
from turbo_core.pipeline import Clip
from turbo_core.pipeline.video import read_made

ROOT = Path(__file__).resolve().parents[2]


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
