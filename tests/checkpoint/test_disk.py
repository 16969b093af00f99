"""Reading files that may shrink: what was mapped is read from the disk, and a file that was cut is an error."""

import os
from random import Random

import pytest
import torch

from turbo_core import checkpoint, disk
from turbo_core.checkpoint.read import open_tensors
from turbo_core.disk import Shorter, Source
from turbo_core.errors import TurboError


def test_a_source_is_read_as_its_bytes(tmp_path):
    random = Random(0)
    data = random.randbytes(20_000)
    (tmp_path / "x").write_bytes(data)
    source = Source(tmp_path / "x")
    assert len(source) == len(data) and source[:] == data
    for _ in range(300):
        a, b = random.randrange(-100, 20_100), random.randrange(-100, 20_100)
        assert source[a:b] == data[a:b], (a, b)
        a, b = max(0, a), min(max(0, b), len(data))
        part = random.choice((data[b - 3 : b], random.randbytes(2))) or b"x"
        assert source.find(part, a, b) == data.find(part, a, b), (part, a, b)
        assert source.rfind(part, a) == data.rfind(part, a), (part, a)


def test_views_are_read_as_they_are(tmp_path):
    torch.manual_seed(0)
    whole = torch.randn(80, 90).bfloat16()
    state = {"whole": whole, "part": whole[3:60:2, 5:], "turned": whole.T, "row": whole[7].expand(40, 90)}
    state |= {"fp8": torch.randn(70, 80).to(torch.float8_e4m3fn), "bool": torch.randn(99, 99) > 0}
    torch.save(state, tmp_path / "x.pth")
    file = open_tensors(tmp_path / "x.pth")
    for name, tensor in state.items():
        assert file.disk.source_of(file.tensors[name]) is not None, name
        copy = file.disk.read(file.tensors[name])
        assert file.disk.source_of(copy) is None and copy.dtype == tensor.dtype
        assert torch.equal(copy.float(), tensor.float()), name
    there = torch.ones(3)
    assert file.disk.read(there) is there


@pytest.mark.skipif(os.name == "nt", reason="Windows lets nobody cut a mapped file: it stays so")
def test_weights_are_read_where_they_fit(ragged, monkeypatch, caplog):
    """A private copy is memory that the system cannot drop: what is larger than 80 % of what is free stays mapped."""
    file = checkpoint.opened(ragged)
    size = sum(tensor.nbytes for tensor in file.tensors.values())
    large = [name for name, tensor in file.tensors.items() if file.disk.source_of(tensor)]
    caplog.set_level("INFO")
    for free, copies, stays in ((size * 1.26, 1, False), (size * 1.24, 1, True), (size * 2.4, 2, True)):
        monkeypatch.setattr(disk, "available_memory", lambda free=free: (free, 1 << 40))
        assert file.disk.stays_mapped(file.tensors.values(), copies) is stays
    assert len(caplog.records) == 2 and f"{ragged} stays mapped" in caplog.text
    monkeypatch.setattr(disk, "available_memory", lambda: None)
    assert not file.disk.stays_mapped(file.tensors.values())
    for mapped in (False, True):
        loaded = checkpoint.weights(file, mapped=mapped)
        assert {file.disk.source_of(loaded[name]) is not None for name in large} == {mapped}
    file.disk.check()
    os.truncate(ragged, size // 2)
    with pytest.raises(TurboError, match=r"ragged\.pth changed while it was read: it was cut short"):
        file.disk.check()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_that_was_cut_is_an_error(tmp_path, ragged, suffix):
    """Touching the mapping would end the process with SIGBUS."""
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(ragged.read_bytes()) if suffix == "pth" else checkpoint.convert(ragged, path, "bf16")
    file, source = open_tensors(path), Source(path)
    os.truncate(path, 6000)
    name = max(file.tensors, key=lambda name: file.tensors[name].nbytes)
    with pytest.raises(TurboError, match=rf"x\.{suffix} changed while it was read: it was cut short"):
        file.disk.read(file.tensors[name])
    with pytest.raises(Shorter, match="cut short while it was read"):
        source[5000:12000]


@pytest.mark.skipif(os.name == "nt", reason="Windows does not let a mapped file be cut")
@pytest.mark.parametrize("format", ["bf16", "int8_block", "fp8"])
def test_a_source_that_is_cut_during_a_conversion(tmp_path, ragged, format):
    target, size, cut = tmp_path / "out.safetensors", ragged.stat().st_size, []

    def progress(done, total):
        if done > size and not cut:  # it was hashed, and the first tensors are written
            cut.append(done)
            os.truncate(ragged, 5000)

    with pytest.raises(TurboError, match=r"ragged\.pth changed while it was read"):
        checkpoint.convert(ragged, target, format, progress)
    assert cut and [path.name for path in tmp_path.iterdir()] == ["ragged.pth"]


@pytest.mark.skipif(os.name == "nt", reason="Windows does not let a mapped file be cut")
def test_a_source_that_is_cut_during_a_merge(tmp_path, ragged):
    others = [tmp_path / f"{name}.pth" for name in ("base", "turbo")]
    for other in others:
        other.write_bytes(ragged.read_bytes())
    with pytest.raises(TurboError, match=r"base\.pth changed while it was read"):
        cut, target = lambda *_: os.truncate(others[0], 5000), tmp_path / "out.safetensors"
        checkpoint.merge(ragged, others[0], [others[1]], target, progress=cut)
    assert not (tmp_path / "out.safetensors").exists()
