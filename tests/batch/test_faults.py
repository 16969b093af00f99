"""What may go wrong around a batch: faults of ours, the folder, the disk, a signature that is to come later."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.batches import command, made, records
from tests.helpers.certificates import make_keys
from turbo_core.batch import Manifest, folder
from turbo_core.batch.workers import settings_at
from turbo_core.cli import batch, main
from turbo_core.files import digest
from turbo_core.parallel import Alone, Sequence
from turbo_core.pipeline import resident
from turbo_core.pipeline.video import read_made


@pytest.fixture
def broken(monkeypatch):
    """Seeds whose sampling ends in an error that nobody foresaw, and that error."""
    seeds, advance = {}, resident.Trajectory.advance

    def sampled(self, *arguments, **settings):
        if self.generator.initial_seed() in seeds:
            raise seeds[self.generator.initial_seed()]
        return advance(self, *arguments, **settings)

    monkeypatch.setattr(resident.Trajectory, "advance", sampled)
    return seeds


def seeds_of(path, count):
    path.write_text("\n".join(json.dumps({"prompt": "a", "seed": seed}) for seed in range(count)))
    return path


def test_a_fault_of_ours_is_one_jobs_and_the_rest_goes_on(tiny, tmp_path, broken, capsys):
    jobs, out = seeds_of(tmp_path / "jobs.jsonl", 7), tmp_path / "out"
    broken.update({1: RuntimeError("boom\nat 0x7f"), 2: RuntimeError("x"), 4: KeyError("k"), 5: RuntimeError("y")})
    assert main(command(tiny, jobs, out)) == 1
    told = capsys.readouterr().err
    assert "jobs.jsonl:2: " in told and "RuntimeError: boom\n" in told and "0x7f" not in told
    states = {record["line"]: record["state"] for record in records(out)}
    assert states == {1: "done", 2: "failed", 3: "failed", 4: "done", 5: "failed", 6: "failed", 7: "done"}
    broken.clear()
    assert main(command(tiny, jobs, out)) == 0
    assert sorted(made(out).values()) == [1] * 7


def test_three_alike_in_a_row_end_it_with_the_cure(tiny, tmp_path, broken, capsys):
    jobs, out = seeds_of(tmp_path / "jobs.jsonl", 6), tmp_path / "out"
    broken.update({seed: RuntimeError("CUDA error: an illegal memory access") for seed in range(6)})
    assert main(command(tiny, jobs, out)) == 2
    told = capsys.readouterr().err
    assert "3 videos in a row failed alike (RuntimeError: CUDA error: an illegal" in told and "--debug" in told
    assert [record["state"] for record in records(out) if record["state"] != "begun"] == ["failed"] * 3


def test_an_encoder_that_stumbles_over_one_prompt_costs_that_one(tiny, tmp_path, prompts, monkeypatch, capsys):
    from turbo_core.pipeline import embeddings

    encode = embeddings.encode_text

    def stumbling(model, tokenizer, texts):
        if texts == ["a blue square"]:
            raise RuntimeError("no such token")
        return encode(model, tokenizer, texts)

    monkeypatch.setattr(embeddings, "encode_text", stumbling)
    assert main(command(tiny, prompts, tmp_path / "out")) == 1
    assert f"{prompts}:2: " in capsys.readouterr().err and len(made(tmp_path / "out")) == 3


def test_check_looks_at_the_folder_and_the_device(tiny, tmp_path, prompts, monkeypatch, capsys):
    out = tmp_path / "out"
    assert main([*command(tiny, prompts, out, "--check"), "--workers", "2"]) == 0
    told = capsys.readouterr().out
    assert "device cpu" in told and "2 processes" in told and "enough: the videos take" in told
    assert not out.exists()
    with Manifest(out):
        assert main(command(tiny, prompts, out, "--check")) == 2
    assert f"is being written by process {os.getpid()}" in capsys.readouterr().err
    assert main(command(tiny, prompts, prompts / "below", "--check")) == 2
    assert "is a file. Expected a folder" in capsys.readouterr().err
    monkeypatch.setattr(folder.os, "access", lambda place, mode: False)
    assert main(command(tiny, prompts, out, "--check")) == 2
    assert "may not be written to" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    assert main(command(tiny, prompts, out, "--check")) == 2
    assert "is full (1.0 kB free)" in capsys.readouterr().err


def test_check_counts_heads_for_processes_that_work_together(tiny, tmp_path, prompts, monkeypatch, capsys):
    class Three(Alone):
        def check(self, num_heads, length):
            sequence = Sequence.__new__(Sequence)
            sequence.rank, sequence.size = 0, 3
            sequence.check(num_heads, length)

    monkeypatch.setattr(batch, "in_team", lambda arguments, run: run(Three()))
    assert main(command(tiny, prompts, tmp_path / "out", "--check")) == 1
    assert "prompts.txt:1: 2 heads do not divide among 3 processes: start 2" in capsys.readouterr().err


def test_the_folder_is_not_listed_for_each_video(tiny, tmp_path, prompts, monkeypatch):
    listed, glob = [], Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: listed.append(pattern) or glob(self, pattern))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.mp4.part").write_text("cut off")
    (tmp_path / "out" / ".old.mp4.turbowan-lock").write_text("")
    given = [item for item in command(tiny, prompts, tmp_path / "out") if item != "--no-cache"]
    assert main([*given, "--cache", str(tmp_path / "cache")]) == 0
    assert len(listed) <= 5, listed  # the manifest's beginning and end, the cache once for each kind of file
    assert not [path for path in (tmp_path / "out").iterdir() if path.suffix not in (".mp4", ".json", ".jsonl")]


def test_without_metadata_a_video_that_was_not_entered_any_more_is_known_by_what_lies_beside(tiny, tmp_path):
    jobs, out = tmp_path / "jobs.jsonl", tmp_path / "out"
    jobs.write_text('{"prompt": "a", "name": "one"}\n{"prompt": "b", "name": "two"}')
    given = command(tiny, jobs, out, "--no-metadata")
    assert main(given) == 0
    assert read_made(out / "one.mp4") is None
    kept = [line for line in (out / "batch.jsonl").read_text().splitlines(True) if '"done"' not in line]
    (out / "batch.jsonl").write_text("".join(kept))
    stamps = {path.name: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    # as if the second had been killed when its settings were there and its file was still the one before
    (out / "two.mp4").write_bytes((out / "one.mp4").read_bytes())
    told = json.loads((out / "two.json").read_text())
    (out / "two.json").write_text(json.dumps(told | {"before": digest([out / "two.mp4"])}))
    assert main(given) == 0
    again = {path.name for path in out.glob("*.mp4") if path.stat().st_mtime_ns != stamps[path.name]}
    assert again == {"two.mp4"}
    jobs.write_text('{"prompt": "another", "name": "one"}')
    assert main(given) == 0
    assert (out / "one.mp4").stat().st_mtime_ns != stamps["one.mp4"]


def test_what_is_done_and_unsigned_is_signed_by_the_next_run(tiny, tmp_path, prompts, capsys):
    pytest.importorskip("c2pa")
    from turbo_core.pipeline.provenance import credentials

    keys, out = make_keys(tmp_path), tmp_path / "out"
    sign = "--sign", keys / "chain.pem", keys / "leaf.key"
    assert main(command(tiny, prompts, out, "--no-metadata")) == 0
    assert main(command(tiny, prompts, out, "--no-metadata", *sign)) == 0
    assert "4 of them were unsigned and are signed now" in capsys.readouterr().err
    assert all(credentials(path)["state"] == "Valid" for path in out.glob("*.mp4"))
    assert main(command(tiny, prompts, out, "--no-metadata", *sign)) == 0
    told = capsys.readouterr().err
    assert "4 of 4 videos are there already" in told and "0 of them were unsigned" in told
    assert sorted(made(out).values()) == [2] * 4  # once made, once entered as signed
    (out / "batch.jsonl").unlink()
    assert main(command(tiny, prompts, out, "--no-metadata", *sign)) == 0
    assert "4 of 4 videos are there already" in capsys.readouterr().err


def test_several_processes_on_a_device_divide_what_is_given():
    devices, given = ["cuda:0", "cuda:1", "cuda:1"], {"dit": "a", "memory": 100}
    found = [settings_at(place, devices, given) for place in range(3)]
    assert [one["memory"] for one in found] == [100, 50, 50]
    assert [one["sharing"] for one in found] == [(1, 3), (2, 3), (2, 3)]
    assert settings_at(2, devices, {"memory": None})["memory"] is None
