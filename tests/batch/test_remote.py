"""Videos to an address by fsspec: its own local and memory file systems, resumed, locked, and what is not there."""

import json
import time

import fsspec
import pytest
from fsspec.registry import known_implementations as known

from tests.helpers.batches import command
from turbo_core.batch import Manifest, remote
from turbo_core.batch.folder import Folder
from turbo_core.batch.jobs import Job
from turbo_core.batch.remote import Remote, folder_of
from turbo_core.cli import main
from turbo_core.errors import TurboError
from turbo_core.pipeline import Clip
from turbo_core.pipeline.video import read_made


@pytest.fixture
def memory():
    """fsspec's memory, empty before and after."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def journal(fs):
    return [json.loads(line) for name in fs.glob("/bucket/clips/batch-*.jsonl") for line in fs.cat(name).splitlines()]


def test_a_batch_in_memory_is_resumed_by_its_journals_and_by_what_lies_beside(tiny, tmp_path, prompts, memory, capsys):
    url = "memory://bucket/clips"
    assert main(command(tiny, prompts, url)) == 0
    videos = memory.glob("/bucket/clips/*.mp4")
    assert len(videos) == 4 == sum(record["state"] == "done" for record in journal(memory))
    (tmp_path / "one.mp4").write_bytes(memory.cat(videos[0]))
    told = json.loads(memory.cat(videos[0].replace(".mp4", ".json")))
    assert read_made(tmp_path / "one.mp4")["id"] == told["settings"]["id"] and told["bytes"] == memory.size(videos[0])
    assert not memory.exists("/bucket/clips/batch-lock.json") and not memory.glob("/bucket/clips/*.part")

    stamps = {name: memory.modified(name) for name in videos}
    memory.rm(memory.glob("/bucket/clips/batch-*.jsonl"))  # killed before any was sent
    claim = {"settings": json.loads(memory.cat(videos[1].replace(".mp4", ".json")))["settings"]}
    memory.pipe_file(videos[1].replace(".mp4", ".json"), json.dumps(claim).encode())  # and between video and settings
    memory.pipe_file(videos[2], memory.cat(videos[2])[:-10])
    memory.rm_file(videos[3])
    capsys.readouterr()
    for already in ("1 of 4", "4 of 4"):
        assert main(command(tiny, prompts, url)) == 0
        assert f"{already} videos are there already" in capsys.readouterr().err
    assert memory.modified(videos[0]) == stamps[videos[0]] and memory.exists(videos[3])
    assert all(memory.modified(name) > stamps[name] for name in videos[1:])


def test_elsewhere_a_video_is_sent_aside_and_renamed(tiny, tmp_path, prompts, monkeypatch):
    moved, target = [], Remote(f"file://{tmp_path}/clips")
    move = type(target.fs).mv
    monkeypatch.setattr(type(target.fs), "mv", lambda *arguments: moved.append(arguments[1:]) or move(*arguments))
    monkeypatch.setattr("turbo_core.batch.manifest.folder_of", lambda _: target)
    for _ in range(2):
        assert main(command(tiny, prompts, "memory://unused")) == 0
    names = sorted(path.name for path in (tmp_path / "clips").iterdir())
    assert len(moved) == 12 and all(one == f"{other}.part" for one, other in moved)
    assert sum(name.endswith(".mp4") for name in names) == 4 == sum(name.endswith(".json") for name in names)
    assert all(read_made(path)["prompt"] for path in (tmp_path / "clips").glob("*.mp4"))
    assert not list(target._near.path.iterdir()), "nothing stays in the scratch folder"


def test_another_batch_is_named_until_it_gives_no_sign_of_life(tiny, prompts, memory, monkeypatch, capsys):
    url = "memory://bucket/clips"
    with Manifest(url):
        for more in ([], ["--check"]):
            assert main(command(tiny, prompts, url, *more)) == 2
            assert f"{url} is being written by process " in capsys.readouterr().err
        now = time.time()
        monkeypatch.setattr(remote.time, "time", lambda: now + 1000)
        assert main(command(tiny, prompts, url, "--check")) == 0
        assert f"folder {url}" in capsys.readouterr().out


def test_the_journal_is_sent_while_the_batch_is_at_work(memory, monkeypatch):
    monkeypatch.setattr(remote, "_EVERY", 0.02)
    with Remote("memory://bucket/clips").journal() as (lines, add):
        add('{"name": "a"}')
        deadline = time.monotonic() + 20
        while not journal(memory):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert lines == [] and journal(memory) == [{"name": "a"}]


def test_what_fails_over_there_is_one_jobs_fault(tiny, prompts, memory, monkeypatch, capsys):
    put = type(memory).put_file

    def refused(self, near, place, **settings):
        if "blue" in place:
            raise PermissionError("403 Forbidden\n<xml>")
        return put(self, near, place, **settings)

    monkeypatch.setattr(type(memory), "put_file", refused)
    assert main(command(tiny, prompts, "memory://bucket/clips")) == 1
    told = capsys.readouterr().err
    assert f"{prompts}:2: " in told and "(PermissionError: 403 Forbidden). Check the address" in told
    assert len(memory.glob("/bucket/clips/*.mp4")) == 3


def test_addresses_that_cannot_be_used_are_told_before_any_model_is_read(tiny, tmp_path, prompts, memory, capsys):
    known["nowhere"] = {"class": "turbo_missing.FileSystem", "err": "Install turbo_missing"}
    try:
        assert main(command(tiny, prompts, "nowhere://bucket/x")) == 2
    finally:
        del known["nowhere"]
    assert "Cure: pip install turbo_missing" in capsys.readouterr().err
    assert main(command(tiny, prompts, "what://x")) == 2
    assert "what://x is no address" in capsys.readouterr().err
    for more in (["--workers", 2], ["--ray"]):
        assert main(command(tiny, prompts, "memory://bucket/clips", *more)) == 2
        assert "memory of one process" in capsys.readouterr().err
    assert isinstance(folder_of(f"file://{tmp_path}/x"), Folder) and folder_of(f"file://{tmp_path}/x").path.name == "x"


def test_what_cannot_be_written_at_all_is_told_at_the_start(tiny, memory, monkeypatch):
    def refused(*arguments, **settings):
        raise OSError("read only")

    monkeypatch.setattr(type(memory), "pipe_file", refused)
    with pytest.raises(TurboError, match=r"Could not write memory://bucket/clips \(OSError: read only\)"):
        Manifest("memory://bucket/clips").__enter__()


def test_what_another_process_sent_meanwhile_is_seen(memory):
    folder = Remote("memory://bucket/clips")
    with folder.journal():
        assert not folder.holds("a.mp4", "id")
        memory.pipe_file("/bucket/clips/a.mp4", b"video")
        memory.pipe_file("/bucket/clips/a.json", json.dumps({"settings": {"id": "id"}, "bytes": 5}).encode())
        assert folder.holds("a.mp4", "id") and not folder.holds("a.mp4", "other")


def test_files_of_a_person_over_there_are_left_alone(memory):
    notes = (
        b'{"notes": "of a person"}',
        *(json.dumps({"settings": {"id": "1"}} | more).encode() for more in ({"bytes": 5}, {})),
    )
    for name, beside in (("lone", None), ("noted", notes[0]), ("ours", notes[1]), ("claimed", notes[2])):
        memory.pipe_file(f"/bucket/clips/{name}.mp4", b"video")
        if beside:
            memory.pipe_file(f"/bucket/clips/{name}.json", beside)
    with Manifest("memory://bucket/clips") as manifest:
        names = "lone", "noted", "ours", "claimed", "none"
        found = [manifest.is_foreign(Job(1, f"{name}.mp4", "1", None, Clip("a"))) for name in names]
    assert found == [True, True, False, False, False]


def test_what_was_sent_by_others_is_entered_with_its_bytes_and_made_again_when_it_is_gone(memory):
    job = Job(1, "a.mp4", "id", None, Clip("a"))
    with Manifest("memory://bucket/clips") as manifest:
        memory.pipe_file("/bucket/clips/a.mp4", b"video")
        memory.pipe_file("/bucket/clips/a.json", json.dumps({"settings": {"id": "id"}, "bytes": 5}).encode())
        assert manifest.is_done(job) and manifest.known["a.mp4"] == ("id", "done", 5)
    memory.rm_file("/bucket/clips/a.mp4")
    for size in (5, None):  # None: as earlier versions wrote it
        with Manifest("memory://bucket/clips") as manifest:
            assert not manifest.is_done(job)
            manifest.known["a.mp4"] = "id", "done", size
            assert not manifest.is_done(job)
