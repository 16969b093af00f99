"""Files are written whole or not at all, and nothing is left beside them."""

import contextlib
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from turbo_core import files
from turbo_core.errors import TurboError
from turbo_core.files import human_bytes, write_whole, written_aside

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("old")
    return path


def test_the_target_is_the_old_file_until_the_new_one_is_whole(target):
    with written_aside(target) as aside:
        aside.write_text("new")
        assert target.read_text() == "old" and aside.parent == target.parent
        assert aside.suffix == ".part"  # no loader lists it as a model
    assert target.read_text() == "new" and os.listdir(target.parent) == [target.name]


def test_what_lies_beside_it_under_that_name_and_is_not_ours_stays(target):
    """Browsers and downloaders call what is not done so."""
    aside = target.with_name(f"{target.name}.part")
    aside.write_text("half a download")
    with pytest.raises(TurboError, match="is in the way"), written_aside(target):
        pytest.fail("wrote")
    assert aside.read_text() == "half a download" and target.read_text() == "old"
    assert sorted(os.listdir(target.parent)) == [target.name, aside.name]


def test_what_is_written_twice_or_read_is_told(target, tmp_path):
    other, link = tmp_path / "other", tmp_path / "link"
    link.symlink_to(target)
    files.check_apart([target, other, None, None], [tmp_path / "third", None, "\ud800", "\0"])
    for written, read, words in (
        ([target, target], [], "so is another file of that name"),
        ([other, link], [target], "it is read"),
        ([tmp_path / "." / "other"], [target, other], "it is read"),
    ):
        with pytest.raises(TurboError, match=words):
            files.check_apart(written, read)


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), RuntimeError("torch could not")])
@pytest.mark.parametrize("moment", ["before anything is there", "half-way", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_beside_it(target, monkeypatch, error, moment):
    def fail(*_):
        raise error

    if moment in ("fsync", "replace"):
        monkeypatch.setattr(files.os, moment, fail)
    with pytest.raises(type(error)), written_aside(target) as aside:
        if moment == "before anything is there":
            raise error
        aside.write_text("ne")
        if moment == "half-way":
            raise error
    assert target.read_text() == "old" and os.listdir(target.parent) == [target.name]


def test_a_text_that_cannot_be_written_names_the_cure(target, monkeypatch):
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(FULL))
    with pytest.raises(TurboError, match=r"Could not write .*model\.safetensors \(.*No space.*\)\. Free space and"):
        write_whole(target, "new")
    with pytest.raises(TurboError, match=r"Check the folder\.$"):
        write_whole(target.parent / "none" / "x.txt", "new", "Check the folder.")
    assert target.read_text() == "old" and os.listdir(target.parent) == [target.name]


def test_sizes_in_words():
    sizes = [0, 999, 1000, 12_345_678, 5e9, 2.5e12, 1e16]
    assert [human_bytes(size) for size in sizes] == [
        "0 B", "999 B", "1.0 kB", "12.3 MB", "5.0 GB", "2.5 TB", "10000.0 TB",
    ]  # fmt: skip


WRITER = """
import sys, time
from turbo_core.files import written_aside
with written_aside(sys.argv[1]) as aside:
    aside.write_text("half")
    print("begun", flush=True)
    time.sleep(float(sys.argv[2]))
    aside.write_text(sys.argv[3])
"""


@contextlib.contextmanager
def another(target, seconds=60, text="theirs"):
    """Another process that writes to the target, and has begun."""
    command = [sys.executable, "-c", WRITER, str(target), str(seconds), text]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(files.__file__).parents[1])
    try:
        assert process.stdout.readline().strip() == b"begun"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_second_writer_is_told_who_the_first_is(target):
    with another(target) as process:
        for call in (files.check_free, lambda path: write_whole(path, "ours")):
            with pytest.raises(TurboError, match=rf"model\.safetensors is being written by process {process.pid} on "):
                call(target)
        assert target.read_text() == "old"
    write_whole(target, "ours")
    assert target.read_text() == "ours"


@pytest.mark.parametrize("name", ["x" * 240, "é" * 120, "x\0", "\ud800"])
def test_names_that_no_disk_takes_are_refused_before_the_work(tmp_path, name):
    with pytest.raises(TurboError, match=r"too long a name|no disk takes"):
        files.check_free(tmp_path / f"{name}.mp4")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes are POSIX's")
def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path):
    """Root may: --json /dev/null would have made an ordinary file of it for everybody."""
    os.mkfifo(tmp_path / "pipe")
    for call in (files.check_free, lambda path: write_whole(path, "ours")):
        with pytest.raises(TurboError, match="a pipe or a device"):
            call(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_what_a_killed_writer_left_is_swept_by_the_next_in_that_folder(target, caplog):
    with another(target):
        pass
    assert len(os.listdir(target.parent)) == 3  # the part and its lock
    write_whole(target.parent / "other.txt", "ours")
    assert sorted(os.listdir(target.parent)) == [target.name, "other.txt"] and target.read_text() == "old"
    assert "removed" in caplog.text and "model.safetensors.part" in caplog.text


@pytest.mark.skipif(not files.fcntl, reason="of flock")
def test_whoever_only_looks_does_not_keep_a_writer_out(target):
    """Two writers were both told that the other one writes."""
    lock = files._lock_of(target)
    with open(lock, "w") as file:  # made, locked and without an owner yet
        files.fcntl.flock(file, files.fcntl.LOCK_EX)
        threading.Timer(0.05, file.close).start()
        files.check_free(target)
        write_whole(target, "ours")
    assert target.read_text() == "ours" and os.listdir(target.parent) == [target.name]


def test_a_writer_at_work_is_not_swept(target):
    with another(target) as process:
        write_whole(target.parent / "other.txt", "ours")
        assert (target.parent / f"{target.name}.part").read_text() == "half" and process.poll() is None


def test_many_writers_to_one_name_leave_one_whole_file(target):
    """Two conversions shared the name of their part file: six of fourteen outputs were a mixture."""
    texts = [str(i) * 100_000 for i in range(6)]
    root = Path(files.__file__).parents[1]
    made = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(target), "0.2", t[:1] * 9], stderr=subprocess.DEVNULL,
                         stdout=subprocess.DEVNULL, cwd=root) for t in texts
    ]  # fmt: skip
    done = [process.wait() for process in made]
    assert 0 in done and target.read_text() in [t[:1] * 9 for t, status in zip(texts, done) if status == 0]
    assert os.listdir(target.parent) == [target.name]


@pytest.fixture
def windows(monkeypatch):
    """Locks as Windows has them, of a byte of a file, and no removal of a file that is open. Not Windows itself."""
    held, unlink, is_linux = {}, Path.unlink, os.path.isdir("/proc/self/fd")
    if not is_linux:
        pytest.skip("the open files of a process are looked up in /proc")

    def locking(fd, mode, count):
        byte = os.fstat(fd).st_ino, os.lseek(fd, 0, os.SEEK_CUR)
        assert count == 1
        if mode == "unlock":
            if held.pop(byte, None) != fd:
                raise PermissionError(errno.EACCES, "not locked")
        elif byte in held:
            raise PermissionError(errno.EACCES, "locked")
        else:
            held[byte] = fd

    def removed(path, *missing):
        if str(path) in [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]:
            raise PermissionError(errno.EACCES, "open")
        unlink(path, *missing)

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(
        files, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK="lock", LK_UNLCK="unlock"), raising=False
    )
    monkeypatch.setattr(Path, "unlink", removed)
    yield held
    assert not held


def test_locks_as_windows_has_them(target, windows):
    write_whole(target, "new")
    assert target.read_text() == "new" and os.listdir(target.parent) == [target.name]
    with written_aside(target) as aside:
        aside.write_text("half")
        for call in (files.check_free, lambda path: write_whole(path, "ours")):
            with pytest.raises(TurboError, match=rf"{target.name} is being written by process {os.getpid()} on "):
                call(target)
        files.sweep(target.parent)
        assert aside.read_text() == "half"
    assert target.read_text() == "half" and os.listdir(target.parent) == [target.name]


def test_what_a_killed_process_left_is_removed_as_windows_lets_it(target, windows):
    """The lock is open while it is looked at: it was never removed."""
    (target.parent / f"{target.name}.part").write_text("half")
    files._lock_of(target).write_text("process 1 on here")
    files.check_free(target)
    files.sweep(target.parent)
    assert os.listdir(target.parent) == [target.name]


def test_a_lock_that_its_owner_is_removing_is_tried_again(target, windows, monkeypatch):
    made, left = open, [1, 1]

    def opened(path, mode, **how):
        if mode == "a+" and left:
            left.pop()
            raise PermissionError(errno.EACCES, "it is being removed")
        return made(path, mode, **how)

    monkeypatch.setattr(files, "open", opened, raising=False)
    write_whole(target, "new")
    assert not left and target.read_text() == "new"


def test_names_that_are_devices_in_windows(tmp_path, windows):
    for name in ("NUL.safetensors", "con", "Aux.tar.gz", "com1.mp4", "LPT9", "com\u00b9.mp4", "nul .mp4"):
        assert files.is_device(name)
        with pytest.raises(TurboError, match="keeps for a device"):
            files.check_free(tmp_path / name)
    for name in ("null.mp4", "console.mp4", "com10.mp4", "a.nul", "com.mp4"):
        assert not files.is_device(name)
        files.check_free(tmp_path / name)


def test_a_disk_without_locks_lets_everybody_in(target, monkeypatch):
    monkeypatch.setattr(files.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    write_whole(target, "new")
    assert target.read_text() == "new" and os.listdir(target.parent) == [target.name]


@pytest.mark.skipif(not files.fcntl, reason="Windows removes no open file")
def test_a_sweep_that_meets_the_lock_of_a_writer_that_is_just_done_leaves_the_next_one_alone(target, monkeypatch):
    lock = files._lock_of(target)
    lock.write_text("")
    locked = files._lock

    def done_meanwhile(file):  # its owner removes it, and another writer begins
        lock.unlink()
        lock.write_text("process 2 on here")
        target.with_name(f"{target.name}.part").write_text("half")
        return locked(file)

    monkeypatch.setattr(files, "_lock", done_meanwhile)
    files.sweep(target.parent)
    assert lock.read_text() == "process 2 on here" and target.with_name(f"{target.name}.part").exists()


def test_on_a_disk_where_no_file_is_itself_writing_goes_on(target, monkeypatch):
    monkeypatch.setattr(files.os.path, "samestat", lambda one, other: False)
    with files.written_aside(target, sweeps=False) as aside:
        aside.write_text("new")
    assert target.read_text() == "new"
