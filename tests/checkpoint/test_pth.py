"""PyTorch checkpoints as archives: the right weights from every honest one, wrong ones from none."""

import struct
import zipfile

import pytest
import torch

from tests.helpers.pickles import STATE, pickled, refused, repacked, same, tensor
from turbo_core.checkpoint.read import open_tensors
from turbo_core.errors import TurboError


def in_the_file(opened):
    """Does the one tensor that is not small lie in the mapping?"""
    return opened.disk.source_of(opened.tensors["large"]) is not None


@pytest.fixture
def good(tmp_path):
    torch.save(STATE, tmp_path / "good.pth")
    return tmp_path / "good.pth"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_packed_again_in_any_way(good, tmp_path, method, streamed):
    """Stored records lie at odd addresses then: torch's own reader computes other places and takes wrong weights."""
    file = open_tensors(repacked(good, tmp_path / "again.pth", method, streamed=streamed))
    assert same(file.tensors, STATE) and in_the_file(file) == (method == zipfile.ZIP_STORED)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_every_protocol_and_the_format_before_torch_1_6(tmp_path, protocol, zipped):
    state = STATE if zipped else {name: t for name, t in STATE.items() if name != "fp8"}
    torch.save(state, tmp_path / "x.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert same(open_tensors(tmp_path / "x.pth").tensors, state)


def test_as_torch_writes_it_stays_in_the_file(good):
    file = open_tensors(good)
    assert in_the_file(file) and same(file.tensors, STATE)


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


def test_what_a_file_is_its_content_says(good, tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, tmp_path / "x.pth")
    file = open_tensors(tmp_path / "x.pth")
    assert file.container == "safetensors" and "named .pth" in file.notes[0]
    good.rename(tmp_path / "y.safetensors")
    file = open_tensors(tmp_path / "y.safetensors")
    assert file.container == "pth" and "named .safetensors" in file.notes[0] and same(file.tensors, STATE)


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
