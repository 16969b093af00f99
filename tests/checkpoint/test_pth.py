"""PyTorch checkpoints: the right weights from every honest one, wrong ones from none, and nothing is ever run."""

import struct
import time
import tracemalloc
import zipfile

import pytest
import torch

from tests.helpers.pickles import Call, Global, Raw, Storage, pickled, repacked, tensor, zipped
from turbo_core.checkpoint.read import open_tensors
from turbo_core.errors import TurboError

STATE = {
    "a": torch.randn(37, 5),
    "half": torch.randn(3, 300).bfloat16(),
    "int8": torch.randint(-128, 128, (130,), dtype=torch.int8),  # an odd length: what follows may lie anywhere
    "fp8": torch.randn(9).to(torch.float8_e4m3fn),
    "none": torch.zeros(0, 4),
    "one": torch.tensor(2.5),
}


def same(loaded, state):
    assert loaded.keys() == state.keys()
    for name, expected in state.items():
        assert loaded[name].dtype == expected.dtype and loaded[name].shape == expected.shape
        assert torch.equal(loaded[name].float(), expected.float()), name
    return True


@pytest.fixture
def good(tmp_path):
    torch.save(STATE, tmp_path / "good.pth")
    return tmp_path / "good.pth"


def refused(path, *words):
    with pytest.raises(TurboError) as error:
        open_tensors(path)
    for word in (str(path), *words):
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_packed_again_in_any_way(good, tmp_path, method, streamed):
    """Stored records lie at odd addresses then: torch's own reader computes other places and takes wrong weights."""
    file = open_tensors(repacked(good, tmp_path / "again.pth", method, streamed=streamed))
    assert same(file.tensors, STATE) and file.mapped == (method == zipfile.ZIP_STORED)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_protocol_and_the_format_before_torch_1_6(tmp_path, protocol, zipped):
    state = STATE if zipped else {name: t for name, t in STATE.items() if name != "fp8"}
    torch.save(state, tmp_path / "x.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert same(open_tensors(tmp_path / "x.pth").tensors, state)


def test_as_torch_writes_it_stays_in_the_file(good):
    file = open_tensors(good)
    assert file.mapped and same(file.tensors, STATE)


def test_a_directory_in_64_bits(good, tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)  # as in a file of more than 4 GB
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    path = repacked(good, tmp_path / "x.pth")
    assert b"PK\6\6" in path.read_bytes() and same(open_tensors(path).tensors, STATE)


def test_without_checksums(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(STATE, tmp_path / "x.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert same(open_tensors(tmp_path / "x.pth").tensors, STATE)


def test_views_parameters_and_negated_tensors(tmp_path):
    whole = torch.randn(6, 8)
    state = {
        "view": whole[1:5, ::2],
        "turned": whole.t(),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "negative": torch._neg_view(whole),
        "imaginary": torch.complex(torch.zeros(4), torch.ones(4)).conj().imag,
        "expanded": torch.ones(1).expand(1000),
    }
    torch.save(state, tmp_path / "x.pth")
    assert same(open_tensors(tmp_path / "x.pth").tensors, {name: t.detach() for name, t in state.items()})
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "y.pth")  # with _metadata, a state of its own
    assert open_tensors(tmp_path / "y.pth").tensors.keys() == {"weight", "bias"}


def test_what_training_dumps_carry_beside_the_weights(tmp_path):
    dump = {
        "model": STATE, "step": 3, "lr": 1e-4, "shape": torch.Size([1, 2]), "where": torch.device("cuda:0"),
        "names": ("a", b"bytes"), "done": None, "big": 1 << 70, "seen": {1, 2}, "kind": torch.bfloat16,
    }  # fmt: skip
    torch.save(dump, tmp_path / "x.pth")
    file = open_tensors(tmp_path / "x.pth")
    assert same(file.tensors, STATE) and "'model'" in file.notes[0]


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


def test_a_flipped_bit_in_the_names_or_shapes_is_found_by_the_checksum(good):
    data = bytearray(good.read_bytes())
    data[data.index(b"storage") + 60] ^= 0x10
    good.write_bytes(data)
    refused(good, "checksum")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d[:-22], "directory is missing"),
        (lambda d: d + b"more", "follows"),
        (lambda d: d[: len(d) // 2], "directory is missing"),
        (lambda d: b"PK\3\4" + bytes(100) + d[104:], "not where the zip's directory says"),
    ],
)
def test_a_damaged_zip(good, change, words):
    good.write_bytes(change(good.read_bytes()))
    refused(good, words)


def test_an_old_file_ends_with_its_storages(tmp_path):
    """A byte put into the last of them moves all that follow."""
    path = tmp_path / "x.pth"
    torch.save({"a": torch.arange(100.0)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    path.write_bytes(data[:-200] + b"x" + data[-200:])
    refused(path, f"its storages end at byte {len(data)}, the file at {len(data) + 1}")


def test_two_directories_are_one_too_many(good):
    """A zip with a second directory in front of the end is read differently by different readers."""
    data = good.read_bytes()
    end = data.rfind(b"PK\5\6")
    size, start = struct.unpack("<2L", data[end + 12 : end + 20])
    good.write_bytes(data[:end] + data[start : start + size] + data[end:])
    refused(good, "not where it is said to be")


def test_big_endian_numbers(good, tmp_path):
    path = repacked(good, tmp_path / "x.pth", change=lambda name, data: b"big" if "byteorder" in name else data)
    refused(path, "big-endian")


def test_the_alignment_that_a_file_claims_is_nobody_s_business(good, tmp_path):
    """torch divides by it."""
    path = repacked(good, tmp_path / "x.pth", change=lambda name, data: b"0" if "alignment" in name else data)
    assert same(open_tensors(path).tensors, STATE)


def test_a_bomb_is_refused_by_its_size(tmp_path):
    path = tmp_path / "x.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("a/data.pkl", pickled({"a": tensor((1 << 24,))}))
        archive.writestr("a/data/0", bytes(1 << 26))
    refused(path, "no weights shrink so far")


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


def test_what_a_file_is_its_content_says(good, tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, tmp_path / "x.pth")
    file = open_tensors(tmp_path / "x.pth")
    assert file.container == "safetensors" and "named .pth" in file.notes[0]
    good.rename(tmp_path / "y.safetensors")
    file = open_tensors(tmp_path / "y.safetensors")
    assert file.container == "pth" and "named .safetensors" in file.notes[0] and same(file.tensors, STATE)


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


@pytest.mark.parametrize(
    "data",
    [
        b"PK\3\4" + b"PK\5\6" + bytes(18),
        b"PK\3\4" + bytes(8) + b"PK\6\7" + bytes(16) + b"PK\5\6" + bytes(18),
        b"\x80\x02I--5\n.",
        "\x80\x02I\u00b2\n.".encode("latin1"),
        b"\x80\x02(" * 3,
    ],
)
def test_small_damage(tmp_path, data):
    (tmp_path / "x.pth").write_bytes(data)
    refused(tmp_path / "x.pth", "damaged, cut short")


def test_the_extra_fields_of_a_directory_may_be_shorter_than_they_say(good):
    data = bytearray(good.read_bytes())
    at = data.rindex(b"PK\1\2")
    name, extra = struct.unpack("<2H", data[at + 28 : at + 32])
    field = b"\1\0\x18\0" + bytes(max(0, extra - 4))
    data[at + 24 : at + 28] = b"\xff" * 4
    data[at + 46 + name : at + 46 + name + extra] = field[:extra]
    good.write_bytes(data)
    with pytest.raises(TurboError):
        open_tensors(good)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_are_quantized_or_sparse_are_called_so(tmp_path, zipped):
    for number, odd in enumerate(
        [torch.quantize_per_tensor(torch.randn(4, 4), 0.1, 0, torch.quint8), torch.eye(4).to_sparse()]
    ):
        path = tmp_path / f"{number}.pth"
        torch.save({"a": odd, "b": torch.ones(2)}, path, _use_new_zipfile_serialization=zipped)
        refused(path, "quantized by torch")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_parameter_with_attributes(tmp_path, zipped):
    parameter = torch.nn.Parameter(torch.randn(3))
    parameter.scale = torch.ones(2)
    torch.save({"a": parameter}, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    assert same(open_tensors(tmp_path / "x.pth").tensors, {"a": parameter.detach()})


def test_what_is_packed_stays_so_where_nobody_asks_for_weights(good, tmp_path):
    path = repacked(good, tmp_path / "x.pth", zipfile.ZIP_DEFLATED)
    file = open_tensors(path, contents=False)
    assert {name: t.shape for name, t in file.tensors.items()} == {name: t.shape for name, t in STATE.items()}
    torch.save({"large": torch.randn(1 << 16)}, tmp_path / "y.pth")
    path = repacked(tmp_path / "y.pth", tmp_path / "z.pth", zipfile.ZIP_DEFLATED)
    assert open_tensors(path, contents=False).tensors["large"].device.type == "meta"
    assert open_tensors(path).tensors["large"].device.type == "cpu"


def _text(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


@pytest.mark.parametrize("by", [1, 4, 16, 64])
@pytest.mark.parametrize("streamed", [None, False, True])
def test_where_a_record_begins_is_held_to_where_the_next_one_does(good, tmp_path, streamed, by):
    """Only a record's own header says how long its extra field is: a flipped bit there moves all of its numbers."""
    path = good if streamed is None else repacked(good, tmp_path / "again.pth", streamed=streamed)
    data = bytearray(path.read_bytes())
    header = data.rindex(b"PK\3\4", 0, data.index(b"/data/0"))
    length = struct.unpack("<H", data[header + 28 : header + 30])[0]
    data[header + 28 : header + 30] = struct.pack("<H", length ^ by)
    path.write_bytes(data)
    refused(path, "the record")
