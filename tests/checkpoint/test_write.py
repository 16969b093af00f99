"""Files on their way to the disk: whole or not at all, room and rights asked for first, tensors where they lie well."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from turbo_core import checkpoint
from turbo_core.checkpoint import write
from turbo_core.errors import TurboError


def test_every_tensor_is_aligned_and_the_library_agrees(tiny, tmp_path):
    path = checkpoint.convert(tiny / "TinyWan2.2-I2V-low.pth", tmp_path / "x.safetensors", "int8_block").path
    data = Path(path).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    sizes = {"F32": 4, "BF16": 2, "I8": 1, "U8": 1}
    assert length % 8 == 0
    assert all(e["data_offsets"][0] % sizes[e["dtype"]] == 0 for k, e in header.items() if k != "__metadata__")
    loaded = checkpoint.load(path)[0]
    with safe_open(path, framework="pt") as file:
        assert all(torch.equal(file.get_tensor(name), loaded[name]) for name in loaded)


def test_weights_lie_on_whole_cache_lines_whatever_the_metadata(tmp_path):
    """A product of the same numbers rounds differently on a CPU when they lie otherwise."""
    layout = {"a": (torch.float32, (3,)), "b": (torch.int8, (128, 64)), "c": (torch.bfloat16, (64, 32))}
    tensors = [(name, torch.zeros(shape, dtype=dtype)) for name, (dtype, shape) in layout.items()]
    for length in range(0, 70, 7):
        path = tmp_path / f"{length}.safetensors"
        write.stream_safetensors(path, layout, tensors, {"note": "x" * length})
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        offsets = {n: start + e["data_offsets"][0] for n, e in json.loads(data[8:start]).items() if n != "__metadata__"}
        assert offsets["b"] % 64 == offsets["c"] % 64 == offsets["a"] % 4 == 0
        assert len(data) == start + 128 * 64 + 64 * 32 * 2 + 12


@pytest.mark.parametrize("name", ["x.pth", "x"])
def test_target_that_is_not_safetensors(ragged, tmp_path, name):
    with pytest.raises(TurboError, match=r"does not end in \.safetensors"):
        checkpoint.convert(ragged, tmp_path / name, "bf16")


def test_target_folder_missing_target_a_folder_format_unknown(ragged, tmp_path):
    with pytest.raises(TurboError, match="no folder"):
        checkpoint.convert(ragged, tmp_path / "no" / "x.safetensors", "bf16")
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(TurboError, match="is a folder"):
        checkpoint.convert(ragged, tmp_path / "dir.safetensors", "bf16")
    with pytest.raises(TurboError, match="int8_block, int8_row, bf16"):
        checkpoint.convert(ragged, tmp_path / "x.safetensors", "int4")


def test_existing_target_is_replaced(ragged, tmp_path):
    target = tmp_path / "x.safetensors"
    target.write_bytes(b"old")
    checkpoint.convert(ragged, target, "bf16")
    assert checkpoint.inspect(target).format == "bf16"


def test_no_room_is_told_before_anything_is_written(ragged, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: usage)
    calls = []
    with pytest.raises(TurboError, match=r"needs .* GiB and the disk has 0\.00 GiB free"):
        checkpoint.convert(ragged, tmp_path / "x.safetensors", "bf16", lambda *call: calls.append(call))
    assert calls == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ragged.pth"]


def failing_put(error, after):
    put, calls = write._put, []

    def fail(file, tensor):
        calls.append(tensor)
        if len(calls) > after:
            raise error
        put(file, tensor)

    return fail


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("after", [0, 20])
@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), TurboError, "disk is full"),
        (OSError(errno.EIO, "Input/output error"), TurboError, "Input/output error"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_failed_write_leaves_the_target_and_no_part(
    ragged, tmp_path, monkeypatch, error, raised, words, after, existing
):
    target = tmp_path / "x.safetensors"
    if existing:
        target.write_bytes(b"precious")
    monkeypatch.setattr(write, "_put", failing_put(error, after))
    with pytest.raises(raised, match=words):
        checkpoint.convert(ragged, target, "int8_block")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ragged.pth"] + ["x.safetensors"] * existing
    assert not existing or target.read_bytes() == b"precious"


def test_interrupt_from_the_progress_bar(ragged, tmp_path):
    def stop(done, total):
        if done > total * 0.8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.convert(ragged, tmp_path / "x.safetensors", "bf16", stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ragged.pth"]
