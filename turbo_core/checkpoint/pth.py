"""A PyTorch checkpoint (.pth) as tensors that lie in the mapped file; nothing in it is run, and no word of it trusted.

Zip archives as torch writes them and as people pack them again, stored or deflated, streamed, of any size; and the
format before torch 1.6. Places come from the zip's one directory; a record must be as long as its numbers, a tensor
must lie within its storage.
"""

import math
import mmap
import struct
import warnings
import zlib
from typing import NamedTuple

import torch

from ..disk import Source
from ..errors import shown
from .places import Damaged, Place, Refused
from .unpickle import MOST, read

_END, _END64, _LOCATOR64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_ENTRY, _LOCAL, _BEHIND = b"PK\1\2", b"PK\3\4", b"PK\7\b"
_STORED, _DEFLATED = 0, 8
_MOST_ENTRIES = 1 << 18
_MOST = 1 << 48  # elements
_PIECE = 1 << 20  # bytes unpacked at a time
FEW = 1 << 12  # bytes that are read and unpacked in any case: what a file says of itself
_RATIO = 64  # weights do not shrink to half; zeros do, but a file of them is no model
_MAGIC = 119547037146038801333356  # what the format before torch 1.6 begins with
_REPEATED = 1 << 16  # elements that a tensor may have beyond those of its storage: an expanded scale


class Record(NamedTuple):
    """A file in the zip: where its bytes lie, how many there are, and how many they become."""

    start: int
    packed: int
    size: int
    method: int
    crc: int  # 0: not recorded
    header: int = 0  # where its header lies

    @property
    def end(self) -> int:
        return self.start + self.packed


class Checkpoint:
    """content: as unpickle.read gives it. tensor(name, place) lies in the mapping, or in memory where it was packed.

    contents False: what was packed, but a few bytes, stays so, and its tensors have no data but shape and type.
    """

    def __init__(self, source: Source, mapping: mmap.mmap, contents: bool = True):
        self._source, self._mapping, self._contents, self._bytes, self._flat = source, mapping, contents, {}, {}
        if source[:4] == _LOCAL:
            self.content, self._runs = _zip(source)
        elif source[257:262] == b"ustar":
            raise Damaged("it is a tar archive of torch before 0.2: load it there and save it again")
        else:
            self.content, self._runs = _legacy(source)

    def tensor(self, name: str, place: Place) -> torch.Tensor:
        """The tensor at a place. Raises Damaged naming it where it does not lie within what the file holds."""
        storage, dtype = place.storage, place.dtype
        if dtype is None:
            raise Damaged(f"{shown(name)} is of a type that torch does not have")
        run = self._runs.get(storage.key)
        if run is None:
            raise Damaged(f"{shown(name)} lies in the record {shown(storage.key)!r}, which is not there")
        itemsize = dtype.itemsize if storage.dtype is None else storage.dtype.itemsize
        wanted = storage.count if storage.dtype is None else storage.count * itemsize
        if run.size != wanted:
            has = f"{run.size:,} bytes, its {storage.count:,} numbers have {wanted:,}"
            raise Damaged(f"the record of {shown(name)} has {has}")
        count = run.size // itemsize
        elements = math.prod(place.shape)
        if math.prod(max(size, 1) for size in place.shape) > _MOST:
            raise Damaged(f"{shown(name)} of the shape {list(place.shape)} is larger than any model")
        if elements == 0:
            return torch.empty(place.shape, dtype=dtype)
        last = place.offset + sum((size - 1) * step for size, step in zip(place.shape, place.stride))
        if last >= count or elements > count + _REPEATED:
            raise Damaged(f"{shown(name)} of the shape {list(place.shape)} does not lie within its {count:,} numbers")
        if run.method != _STORED and not self._contents and run.size > FEW:
            return torch.empty(place.shape, dtype=dtype, device="meta")
        key = storage.key, dtype
        if key not in self._flat:
            self._flat[key] = self._numbers(name, storage.key, run, dtype, count)
        tensor = self._flat[key].as_strided(place.shape, place.stride, place.offset)
        return tensor.neg() if place.negative else tensor

    def _numbers(self, name, key, run, dtype, count):
        if run.method == _STORED and run.size > FEW:
            # at odd addresses too, where it was packed again: processors read them
            return numbers(self._mapping, dtype, count, run.start)
        if key not in self._bytes and run.method == _STORED:
            self._bytes[key] = bytearray(self._source[run.start : run.end])
        elif key not in self._bytes:
            self._bytes[key] = _unpacked(self._source, run, f"the record of {shown(name)}")
        return numbers(self._bytes[key], dtype, count, 0)


def numbers(buffer, dtype: torch.dtype, count: int, start: int) -> torch.Tensor:
    """`count` numbers at a byte of a mapping or a bytearray, as a tensor that lies there."""
    if count == 0:
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(buffer, dtype=dtype, count=count, offset=start)


def _zip(source):
    records = directory(source)
    pickles = [name for name in records if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(pickles) != 1:
        if any("/code/" in name for name in records):
            raise Refused("a TorchScript program")
        raise Damaged(f"the zip has {len(pickles)} records data.pkl, expected one")
    root = pickles[0].removesuffix("data.pkl")
    order = records.get(f"{root}byteorder")
    if order is not None and (order.size > 8 or _contents(source, order, "byteorder").strip() != b"little"):
        raise Damaged("its numbers are big-endian, expected little-endian: save it again on another machine")
    pickled = records[pickles[0]]
    if pickled.size > MOST:
        raise Damaged(f"its data.pkl has {pickled.size:,} bytes, expected at most {MOST:,}")
    content = read(_contents(source, pickled, "data.pkl")).content
    data = f"{root}data/"
    runs = {name.removeprefix(data): record for name, record in records.items() if name.startswith(data)}
    if any(run.method != _STORED for run in runs.values()):
        packed, size = sum(run.packed for run in runs.values()), sum(run.size for run in runs.values())
        if size > _RATIO * packed + MOST:
            raise Damaged(f"its {packed:,} packed bytes would become {size:,}: no weights shrink so far")
    return content, runs


def directory(source) -> dict[str, Record]:
    """{name: record} of a zip archive. Raises Damaged unless there is one directory, at the end, of records that lie
    before it one after another under the names that stand there."""
    size = len(source)
    end = source.rfind(_END, max(0, size - 22 - 65535))
    if end < 0 or end + 22 > size:
        raise Damaged("it is cut short: the zip's directory is missing")
    disk, first, here, count, length, start, comment = struct.unpack("<4H2LH", source[end + 4 : end + 22])
    if end + 22 + comment != size:
        raise Damaged("something follows the zip's directory")
    stop = end
    if end >= 20 and source[end - 20 : end - 16] == _LOCATOR64:
        (stop,) = struct.unpack("<Q", source[end - 12 : end - 4])
        if stop > end - 76 or source[stop : stop + 4] != _END64:
            raise Damaged("the zip's directory is not where it is said to be")
        here, count, length, start = struct.unpack("<4Q", source[stop + 24 : stop + 56])
    if disk or first or here != count or start + length != stop:
        raise Damaged("the zip's directory is not where it is said to be")
    if count > _MOST_ENTRIES:
        raise Damaged(f"the zip has {count:,} records, expected at most {_MOST_ENTRIES:,}")
    records, at = {}, start
    for _ in range(count):
        name, record, at = _entry(source, at, stop)
        if name in records:
            raise Damaged(f"the zip has two records {shown(name)!r}")
        records[name] = record
    if at != stop:
        raise Damaged("the zip's directory is longer than its records")
    _check_order(source, records, start)
    return records


def _check_order(source, records, stop):
    """Raise Damaged unless each record ends where the next begins, or before its sizes, repeated as streams do. Where
    it begins only its own header says: a flipped bit there would move the numbers."""
    ordered = sorted(records.items(), key=lambda item: item[1].start)
    for (name, record), following in zip(ordered, [*(record.header for _, record in ordered[1:]), stop]):
        end = record.end
        gap = following - end
        if gap < 0:
            raise Damaged(f"the record {shown(name)!r} lies over another one")
        moved = any(_repeats(source, end - length, length, record) for length in (16, 24))
        if moved or (gap and (gap not in (16, 24) or not _repeats(source, end, gap, record))):
            raise Damaged(f"the record {shown(name)!r} does not end where the next one begins")


def _repeats(source, at, length, record) -> bool:
    """Do the sizes of a record stand at a byte, as streams write them behind it?"""
    behind = source[at : at + length]
    form = "<2L" if length == 16 else "<2Q"
    return behind[:4] == _BEHIND and struct.unpack(form, behind[8:]) == (record.packed, record.size)


def _entry(source, at, stop):
    if at + 46 > stop or source[at : at + 4] != _ENTRY:
        raise Damaged("the zip's directory is damaged")
    fields = struct.unpack("<6H3L5H2L", source[at + 4 : at + 46])
    flags, method, crc, packed, size = fields[2], fields[3], fields[6], fields[7], fields[8]
    name_length, extra_length, comment_length, header = fields[9], fields[10], fields[11], fields[15]
    end = at + 46 + name_length + extra_length + comment_length
    if end > stop:
        raise Damaged("the zip's directory is damaged")
    raw = source[at + 46 : at + 46 + name_length]
    size, packed, header = _wide(source[at + 46 + name_length : end - comment_length], size, packed, header)
    name = raw.decode("utf-8", "replace")
    local = source[header : header + 30]
    if len(local) < 30 or local[:4] != _LOCAL or source[header + 30 : header + 30 + len(raw)] != raw:
        raise Damaged(f"the record {shown(name)!r} is not where the zip's directory says")
    here_method, here_name, here_extra = struct.unpack("<H", local[8:10])[0], *struct.unpack("<2H", local[26:30])
    if flags & 1 or method not in (_STORED, _DEFLATED) or here_method != method or here_name != name_length:
        raise Damaged(f"the record {shown(name)!r} is encrypted or packed in an unknown way, expected a plain zip")
    if method == _STORED and packed != size:
        raise Damaged(f"the record {shown(name)!r} has two sizes")
    return name, Record(header + 30 + here_name + here_extra, packed, size, method, crc, header), end


def _wide(extra, size, packed, header):
    """The three numbers, those of zip64 in place of those that did not fit."""
    while len(extra) >= 4:
        kind, length = struct.unpack("<2H", extra[:4])
        if kind == 1:
            whole = min(length, len(extra) - 4) // 8
            numbers = list(struct.unpack(f"<{whole}Q", extra[4 : 4 + 8 * whole]))
            found = []
            for value in (size, packed, header):
                if value == 0xFFFFFFFF:
                    if not numbers:
                        raise Damaged("the zip's directory is damaged")
                    value = numbers.pop(0)
                found.append(value)
            return found
        extra = extra[4 + length :]
    return size, packed, header


def _contents(source, record, what) -> bytes:
    """The bytes of a small record, held to its checksum."""
    if record.method == _DEFLATED:
        return bytes(_unpacked(source, record, what))
    data = source[record.start : record.end]
    if record.crc and zlib.crc32(data) != record.crc:
        raise Damaged(f"{what} does not have the checksum that it was written with")
    return data


def _unpacked(source, record, what) -> bytearray:
    """The bytes of a deflated record, in one buffer, held to its checksum."""
    data, size, unpack = bytearray(record.size), 0, zlib.decompressobj(-15)
    try:
        for start in range(record.start, record.end, _PIECE):
            part = unpack.decompress(source[start : min(start + _PIECE, record.end)])
            if size + len(part) > record.size:
                raise Damaged(f"{what} has more than the {record.size:,} bytes of the zip's directory")
            data[size : size + len(part)] = part
            size += len(part)
    except zlib.error as error:
        raise Damaged(f"{what} cannot be unpacked ({error})") from error
    if size != record.size:
        raise Damaged(f"{what} has {size:,} bytes, the zip's directory says {record.size:,}")
    if record.crc and zlib.crc32(data) != record.crc:
        raise Damaged(f"{what} does not have the checksum that it was written with")
    return data


def _legacy(source):
    magic = read(source)
    if magic.content != _MAGIC:
        raise Damaged("it is not a PyTorch file")
    version = read(source, magic.end)
    system = read(source, version.end)
    little = isinstance(system.content, dict) and system.content.get("little_endian") is True
    if version.content != 1001 or not little:
        raise Damaged("it is of an unknown old version, or its numbers are big-endian")
    pickled = read(source, system.end)
    listed = read(source, pickled.end)
    keys, at = listed.content, listed.end
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise Damaged("the list of its storages is damaged")
    runs = {}
    for key in keys:
        storage = pickled.storages.get(key)
        count = int.from_bytes(source[at : at + 8], "little")
        if storage is None:
            raise Damaged(f"its storage {shown(key)!r} is quantized by torch, or belongs to no tensor")
        size = count * (1 if storage.dtype is None else storage.dtype.itemsize)
        if count != storage.count or at + 8 + size > len(source):
            has = f"{count:,} numbers, expected {storage.count:,}"
            raise Damaged(f"its storage {shown(key)!r} has {has}: it is cut short")
        runs[key] = Record(at + 8, size, size, _STORED, 0)
        at += 8 + size
    if at != len(source):
        raise Damaged(f"its storages end at byte {at}, the file at {len(source)}")
    return pickled.content, runs


def checksums(source) -> list[tuple[int, int, int, str]]:
    """(start, end, checksum, name) of the stored records of a zip .pth that have one, as they lie in the file."""
    if source[:4] != _LOCAL:
        return []
    stored = [(r.start, r.start + r.size, r.crc, name) for name, r in directory(source).items() if r.method == _STORED]
    return sorted(record for record in stored if record[2])
