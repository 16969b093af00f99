"""Files are written whole or not at all, and nothing is left beside them."""

import errno
import os

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
