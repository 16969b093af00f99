"""Pickles and zips of .pth files made by hand, as no torch would write them."""

import math
import struct
import zipfile
from typing import NamedTuple

import pytest
import torch

from turbo_core.checkpoint.read import open_tensors
from turbo_core.errors import TurboError


class Global(NamedTuple):
    module: str
    name: str


class Call(NamedTuple):
    function: Global
    arguments: tuple


class Storage(NamedTuple):
    key: str = "0"
    count: int = 16
    kind: str = "FloatStorage"


class Raw(NamedTuple):
    code: bytes


def pickled(value) -> bytes:
    """A pickle of protocol 2."""
    return b"\x80\x02" + _code(value) + b"."


def _code(value) -> bytes:
    if isinstance(value, Raw):
        return value.code
    if isinstance(value, Global):
        return b"c" + value.module.encode() + b"\n" + value.name.encode() + b"\n"
    if isinstance(value, Call):
        return _code(value.function) + _code(value.arguments) + b"R"
    if isinstance(value, Storage):
        return _code(("storage", Global("torch", value.kind), value.key, "cpu", value.count)) + b"Q"
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if isinstance(value, int):
        size = value.bit_length() // 8 + 1
        return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(text)) + text
    if isinstance(value, dict):
        return b"}(" + b"".join(_code(k) + _code(v) for k, v in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_code, value)) + b"e"
    return b"(" + b"".join(map(_code, value)) + b"t"


def tensor(shape=(4, 4), stride=None, offset=0, storage=None, flags=None) -> Call:
    """What torch pickles of a float32 tensor."""
    if stride is None:
        stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    storage = storage or Storage(count=math.prod(shape))
    more = () if flags is None else (flags,)
    hooks = Call(Global("collections", "OrderedDict"), ())
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), (storage, offset, shape, stride, False, hooks, *more))


def zipped(path, pickle: bytes, records: dict[str, bytes], byteorder=b"little", root="archive"):
    """The path, after writing a .pth of these parts."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", pickle)
        if byteorder is not None:
            archive.writestr(f"{root}/byteorder", byteorder)
        for key, data in records.items():
            archive.writestr(f"{root}/data/{key}", data)
    return path


def repacked(source, target, method=zipfile.ZIP_STORED, change=lambda name, data: data, streamed=False):
    """The target, after packing a .pth again; streamed: as to a pipe, sizes behind the data."""

    class Pipe:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    with zipfile.ZipFile(source) as old, open(target, "wb") as file:
        new = zipfile.ZipFile(Pipe(file) if streamed else file, "w", method)
        with new:
            for entry in old.infolist():
                new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return target


STATE = {
    "a": torch.randn(37, 5),
    "half": torch.randn(3, 300).bfloat16(),
    "int8": torch.randint(-128, 128, (130,), dtype=torch.int8),  # an odd length: what follows may lie anywhere
    "fp8": torch.randn(9).to(torch.float8_e4m3fn),
    "large": torch.randn(41, 43),  # more than the bytes that are always read
    "none": torch.zeros(0, 4),
    "one": torch.tensor(2.5),
}


def same(loaded, state):
    assert loaded.keys() == state.keys()
    for name, expected in state.items():
        assert loaded[name].dtype == expected.dtype and loaded[name].shape == expected.shape
        assert torch.equal(loaded[name].float(), expected.float()), name
    return True


def refused(path, *words):
    with pytest.raises(TurboError) as error:
        open_tensors(path)
    for word in (str(path), *words):
        assert word in str(error.value), str(error.value)
