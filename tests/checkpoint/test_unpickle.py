"""The pickle inside a PyTorch checkpoint: nothing in it is ever run, and nothing takes longer than it is long."""

import struct
import time
import tracemalloc

import pytest
import torch

from tests.helpers.pickles import Call, Global, Raw, Storage, pickled, refused, same, tensor, zipped
from turbo_core.checkpoint.read import open_tensors
from turbo_core.errors import TurboError

FLOATS = struct.pack("<16f", *range(16))


def test_a_pickle_by_hand(tmp_path):
    path = zipped(tmp_path / "x.pth", pickled({"a": tensor()}), {"0": FLOATS}, byteorder=None, root="any/where")
    assert same(open_tensors(path).tensors, {"a": torch.arange(16.0).view(4, 4)})


@pytest.mark.parametrize(
    ("content", "records", "words"),
    [
        (tensor((4, 5), storage=Storage(count=16)), {"0": FLOATS}, "does not lie within its 16 numbers"),
        (tensor(offset=1), {"0": FLOATS}, "does not lie within"),
        (tensor(stride=(4, 2)), {"0": FLOATS}, "does not lie within"),
        (tensor(stride=(4, -1)), {"0": FLOATS}, "shape or strides are none"),
        (tensor(offset=-1), {"0": FLOATS}, "not described as torch does"),
        (tensor((10**9,), (0,), storage=Storage(count=16)), {"0": FLOATS}, "does not lie within"),
        (tensor(storage=Storage(count=15)), {"0": FLOATS}, "has 64 bytes, its 15 numbers have 60"),
        (tensor(storage=Storage(kind="DoubleStorage")), {"0": FLOATS}, "its 16 numbers have 128"),
        (tensor(storage=Storage("1")), {"0": FLOATS}, "record '1', which is not there"),
        (tensor((True, 4)), {"0": FLOATS}, "shape or strides are none"),
    ],
)
def test_a_tensor_lies_within_what_the_file_holds(tmp_path, content, records, words):
    refused(zipped(tmp_path / "x.pth", pickled({"a": content}), records), words)


HARMFUL = Global("os", "system")


@pytest.mark.parametrize(
    "value",
    [
        Call(HARMFUL, ("touch canary",)),
        HARMFUL,  # named is enough
        Call(Global("builtins", "eval"), ("1",)),
        Call(Global("torch", "load"), ("x",)),
        Call(Global("torch._utils", "_rebuild_tensor_v2.__globals__"), ()),
        Call(Global("_codecs", "encode"), ("a" * 100, "hex")),
        Call(Global("torch._tensor", "_rebuild_from_type_v2"), (HARMFUL, Global("torch", "Tensor"), (), {})),
        Raw(b"(ios\nsystem\n"),  # INST
        Raw(b"X\x02\0\0\0osX\x06\0\0\0system\x93"),  # STACK_GLOBAL
        Raw(b"ccollections\nOrderedDict\n)\x81"),  # NEWOBJ
        Raw(b"\x82\x01"),
        {(("a",),): 1},  # tuples of tuples may take for ever to hash
    ],
)
def test_whatever_is_no_tensor_is_refused_by_name(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    for path in (
        zipped(tmp_path / "x.pth", pickled({"a": tensor(), "b": value}), {"0": FLOATS}),
        tmp_path / "old.pth",
    ):
        if path.name == "old.pth":
            path.write_bytes(pickled({"b": value}))
        refused(path, "was refused", "Nothing was run")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "pickle",
    [
        b"\x80\x02}J\x01", b"\x80\x02.", b"", b"\x80\x02}(X\xff\xff\xff\xffa", b"\x80\x02s.", b"\x80\x02(u.",
        b"\x80\x02}X\x01\0\0\0as.", b"\x80\x02h\x05.", b"\x80\x02}(X\x01\0\0\0a]]]u.", b"\x80\x02\x8b\xff\xff\xff\x7f",
        b"\x80\x02I" + b"9" * 5000 + b"\n.", b"\x80\x02]" + b"2" * 100, b"\x80\x02Iabc\n.", b"\x80\x02)R.",
    ],
)  # fmt: skip
def test_a_broken_pickle_is_damage(tmp_path, pickle):
    path = zipped(tmp_path / "x.pth", pickle, {"0": FLOATS})
    with pytest.raises(TurboError, match=r"damaged, cut short|was refused|without named tensors"):
        open_tensors(path)


def test_shared_dictionaries_are_counted_once(tmp_path):
    """Three levels of a thousand names for one dictionary each are a thousand million leaves."""
    levels = b"}(" + b"".join(_text(f"k{i}") + b"N" for i in range(1000)) + b"uq\0"
    for level in range(1, 4):
        levels = (
            levels
            + b"0}("
            + b"".join(_text(f"k{i}") + b"h" + bytes([level - 1]) for i in range(1000))
            + b"uq"
            + bytes([level])
        )
    began = time.perf_counter()
    refused(zipped(tmp_path / "x.pth", b"\x80\x02" + levels + b".", {}), "without named tensors")
    assert time.perf_counter() - began < 2


def test_a_text_larger_than_any_pickle_takes_no_memory(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(b"\x80\x02\x8d" + struct.pack("<Q", 1 << 40) + bytes(1 << 12))
    tracemalloc.start()
    refused(path, "damaged")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def untyped(kind="float32", shape=(4, 4), storage=None, flags=None):
    """What torch pickles of a tensor of a type that has no storage of its own."""
    storage = storage or Raw(
        pickled(Storage(kind="x"))[2:-1].replace(b"ctorch\nx\n", b"ctorch.storage\nUntypedStorage\n")
    )
    hooks, stride = Call(Global("collections", "OrderedDict"), ()), tensor(shape).arguments[3]
    given = (storage, 0, shape, stride, False, hooks, Global("torch", kind), *(() if flags is None else (flags,)))
    return Call(Global("torch._utils", "_rebuild_tensor_v3"), given)


@pytest.mark.parametrize("kind", ["quint8", "qint8", "quint4x2", "bits8", "uint4", "float8_e8m0fnu", "complex32"])
def test_a_type_that_no_tensor_is_made_of_is_damage(tmp_path, kind):
    """With some of them torch.frombuffer ends the process."""
    refused(zipped(tmp_path / "x.pth", pickled({"a": untyped(kind=kind)}), {"0": bytes(16)}), "not have")


def test_one_type_in_a_storage_of_another(tmp_path):
    """It read the bytes behind the record."""
    content = untyped(kind="float64", storage=Storage())
    refused(zipped(tmp_path / "x.pth", pickled({"a": content}), {"0": FLOATS, "1": FLOATS}), "storage of another")


@pytest.mark.parametrize("kind", ["BoolStorage", "ByteStorage", "IntStorage"])
def test_a_negated_tensor_without_a_sign(tmp_path, kind):
    content = tensor((4,), storage=Storage(count=4, kind=kind), flags={"neg": True})
    refused(zipped(tmp_path / "x.pth", pickled({"a": content}), {"0": bytes(16)}), "no sign")


def test_an_empty_tensor_of_a_giant_shape(tmp_path):
    path = zipped(
        tmp_path / "x.pth",
        pickled({"a": tensor((0, 1 << 40, 1 << 40), (0, 0, 0), storage=Storage(count=0))}),
        {"0": b""},
    )
    refused(path, "larger than any model")


TWICE = b"(h\x00h\x00lq\x00"  # a list that holds the one before it twice


@pytest.mark.parametrize(
    "code",
    [
        b"".join(b"\x8a\x08" + struct.pack("<q", i * ((1 << 61) - 1) % (1 << 63)) + b"N" for i in range(8)),
        b"".join(b"\x8a\x0b" + (i * ((1 << 61) - 1)).to_bytes(11, "little") + b"N" for i in range(8, 40000)),
        b"X\x01\0\0\0a]q\0" + b"0]q\0" + TWICE * 40 + b"X\x01\0\0\0b\x93",  # as the module of a name
        b"X\x01\0\0\0a]q\0" + b"0]q\0" + TWICE * 40 + b")\x81",  # as a class
        b"X\x01\0\0\0ac_codecs\nencode\nX\x01\0\0\0x]q\0" + b"0]q\0" + TWICE * 40 + b"\x86R",  # as an encoding
    ],
    ids=["few keys", "many keys", "module", "class", "encoding"],
)
def test_nothing_takes_longer_than_the_pickle_is_long(tmp_path, code):
    """Keys that collide, lists of lists of lists that are shown."""
    began = time.perf_counter()
    path = zipped(tmp_path / "x.pth", b"\x80\x02}(" + code + b"u.", {"0": FLOATS})
    with pytest.raises(TurboError):
        open_tensors(path)
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    "call",
    [
        b"c_codecs\nencode\nh\x01X\x06\0\0\0latin1\x86R",
        b"ccollections\nOrderedDict\nh\x01\x85R",
        b"ctorch\nSize\nh\x01\x85R",
    ],
)
def test_a_value_that_is_given_to_many_calls_is_counted_each_time(tmp_path, call):
    """A text of 4 MB encoded 400 times was 1.8 GB."""
    size = 1 << 17
    big = b"X" + struct.pack("<I", size) + b"a" * size if b"_codecs" in call else b"](" + b"K\x01" * size + b"e"
    path = zipped(tmp_path / "x.pth", b"\x80\x02](" + big + b"q\x01" + call * 600 + b"e.", {"0": FLOATS})
    tracemalloc.start()
    with pytest.raises(TurboError):
        open_tensors(path)
    assert tracemalloc.get_traced_memory()[1] < 200 << 20
    tracemalloc.stop()


def _text(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()
