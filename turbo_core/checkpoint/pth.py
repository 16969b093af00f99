"""A PyTorch checkpoint (.pth) as tensors that lie in the mapped file; nothing in it is run, and no word of it trusted.

Zip archives as torch writes them and as people pack them again, stored or deflated, streamed, of any size; and the
format before torch 1.6. Places come from the zip's one directory; a record must be as long as its numbers, a tensor
must lie within its storage.
"""

import mmap
import struct
import warnings
import zlib
from typing import NamedTuple

import torch

from ..errors import shown
from .places import Damaged, Place, Refused, Storage
from .unpickle import MOST, read

_END, _END64, _LOCATOR64 = b"PK\5\6", b"PK\6\6", b"PK\6\7"
_ENTRY, _LOCAL = b"PK\1\2", b"PK\3\4"
_STORED, _DEFLATED = 0, 8
_MOST_ENTRIES = 1 << 18
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


class Checkpoint:
    """content: as unpickle.read gives it. tensor(name, place) lies in the mapping, or in memory where it was
    packed."""

    def __init__(self, mapping: mmap.mmap):
        self._mapping, self._flat = mapping, {}
        self.mapped = True
        if mapping[:4] == _LOCAL:
            self.content, self._runs = _zip(mapping)
        elif mapping[257:262] == b"ustar":
            raise Damaged("it is a tar archive of torch before 0.2: load it there and save it again")
        else:
            self.content, self._runs = _legacy(mapping)

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
        elements = 1
        for size in place.shape:
            elements *= size
        if elements == 0:
            return torch.empty(place.shape, dtype=dtype)
        last = place.offset + sum((size - 1) * step for size, step in zip(place.shape, place.stride))
        if last >= count or elements > count + _REPEATED:
            raise Damaged(f"{shown(name)} of the shape {list(place.shape)} does not lie within its {count:,} numbers")
        key = storage.key, dtype
        if key not in self._flat:
            self._flat[key] = self._numbers(name, run, dtype, count)
        tensor = self._flat[key].as_strided(place.shape, place.stride, place.offset)
        return tensor.neg() if place.negative else tensor

    def _numbers(self, name, run, dtype, count):
        if run.method == _STORED:  # at odd addresses too, where it was packed again: processors read them
            return numbers(self._mapping, dtype, count, run.start)
        self.mapped = False
        data = bytearray(_contents(self._mapping, run, f"the record of {shown(name)}"))
        return numbers(data, dtype, count, 0)


def numbers(buffer, dtype: torch.dtype, count: int, start: int) -> torch.Tensor:
    """`count` numbers at a byte of a mapping or a bytearray, as a tensor that lies there."""
    if count == 0:
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(buffer, dtype=dtype, count=count, offset=start)


def _zip(mapping):
    records = directory(mapping)
    pickles = [name for name in records if name.endswith("/data.pkl") or name == "data.pkl"]
    if len(pickles) != 1:
        if any("/code/" in name for name in records):
            raise Refused("a TorchScript program")
        raise Damaged(f"the zip has {len(pickles)} records data.pkl, expected one")
    root = pickles[0].removesuffix("data.pkl")
    order = records.get(f"{root}byteorder")
    if order is not None and (order.size > 8 or _contents(mapping, order, "byteorder").strip() != b"little"):
        raise Damaged("its numbers are big-endian, expected little-endian: save it again on another machine")
    pickled = records[pickles[0]]
    if pickled.size > MOST:
        raise Damaged(f"its data.pkl has {pickled.size:,} bytes, expected at most {MOST:,}")
    content, _ = read(_contents(mapping, pickled, "data.pkl", checked=True))
    data = f"{root}data/"
    runs = {name.removeprefix(data): record for name, record in records.items() if name.startswith(data)}
    if any(run.method != _STORED for run in runs.values()):
        packed, size = sum(run.packed for run in runs.values()), sum(run.size for run in runs.values())
        if size > _RATIO * packed + MOST:
            raise Damaged(f"its {packed:,} packed bytes would become {size:,}: no weights shrink so far")
    return content, runs


def directory(mapping) -> dict[str, Record]:
    """{name: record} of a zip archive. Raises Damaged unless there is one directory, at the end, of records that lie
    before it one after another under the names that stand there."""
    size = len(mapping)
    end = mapping.rfind(_END, max(0, size - 22 - 65535))
    if end < 0 or end + 22 > size:
        raise Damaged("it is cut short: the zip's directory is missing")
    disk, first, here, count, length, start, comment = struct.unpack("<4H2LH", mapping[end + 4 : end + 22])
    if end + 22 + comment != size:
        raise Damaged("something follows the zip's directory")
    stop = end
    if mapping[end - 20 : end - 16] == _LOCATOR64:
        (stop,) = struct.unpack("<Q", mapping[end - 12 : end - 4])
        if stop > end - 76 or mapping[stop : stop + 4] != _END64:
            raise Damaged("the zip's directory is not where it is said to be")
        here, count, length, start = struct.unpack("<4Q", mapping[stop + 24 : stop + 56])
    if disk or first or here != count or start + length != stop:
        raise Damaged("the zip's directory is not where it is said to be")
    if count > _MOST_ENTRIES:
        raise Damaged(f"the zip has {count:,} records, expected at most {_MOST_ENTRIES:,}")
    records, at = {}, start
    for _ in range(count):
        name, record, at = _entry(mapping, at, stop)
        if name in records:
            raise Damaged(f"the zip has two records {shown(name)!r}")
        records[name] = record
    if at != stop:
        raise Damaged("the zip's directory is longer than its records")
    end = 0
    for name, record in sorted(records.items(), key=lambda item: item[1].start):
        if record.start < end or record.start + record.packed > start:
            raise Damaged(f"the record {shown(name)!r} lies over another one")
        end = record.start + record.packed
    return records


def _entry(mapping, at, stop):
    if at + 46 > stop or mapping[at : at + 4] != _ENTRY:
        raise Damaged("the zip's directory is damaged")
    fields = struct.unpack("<6H3L5H2L", mapping[at + 4 : at + 46])
    flags, method, crc, packed, size = fields[2], fields[3], fields[6], fields[7], fields[8]
    name_length, extra_length, comment_length, header = fields[9], fields[10], fields[11], fields[15]
    end = at + 46 + name_length + extra_length + comment_length
    if end > stop:
        raise Damaged("the zip's directory is damaged")
    raw = mapping[at + 46 : at + 46 + name_length]
    size, packed, header = _wide(mapping[at + 46 + name_length : end - comment_length], size, packed, header)
    name = raw.decode("utf-8", "replace")
    local = mapping[header : header + 30]
    if len(local) < 30 or local[:4] != _LOCAL or mapping[header + 30 : header + 30 + len(raw)] != raw:
        raise Damaged(f"the record {shown(name)!r} is not where the zip's directory says")
    here_method, here_name, here_extra = struct.unpack("<H", local[8:10])[0], *struct.unpack("<2H", local[26:30])
    if flags & 1 or method not in (_STORED, _DEFLATED) or here_method != method or here_name != name_length:
        raise Damaged(f"the record {shown(name)!r} is encrypted or packed in an unknown way, expected a plain zip")
    if method == _STORED and packed != size:
        raise Damaged(f"the record {shown(name)!r} has two sizes")
    return name, Record(header + 30 + here_name + here_extra, packed, size, method, crc), end


def _wide(extra, size, packed, header):
    """The three numbers, those of zip64 in place of those that did not fit."""
    while len(extra) >= 4:
        kind, length = struct.unpack("<2H", extra[:4])
        if kind == 1:
            numbers = list(struct.unpack(f"<{min(length, len(extra) - 4) // 8}Q", extra[4 : 4 + length // 8 * 8]))
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


def _contents(mapping, record, what, checked=False) -> bytes:
    """The bytes of a record, unpacked; checked: against its checksum also where it was only stored."""
    data = mapping[record.start : record.start + record.packed]
    if record.method == _DEFLATED:
        unpack = zlib.decompressobj(-15)
        try:
            data = unpack.decompress(data, record.size + 1)
        except zlib.error as error:
            raise Damaged(f"{what} cannot be unpacked ({error})") from error
        checked = True
    if len(data) != record.size:
        raise Damaged(f"{what} has {len(data):,} bytes, the zip's directory says {record.size:,}")
    if checked and record.crc and zlib.crc32(data) != record.crc:
        raise Damaged(f"{what} does not have the checksum that it was written with")
    return data


def _legacy(mapping):
    magic, at = read(mapping)
    if magic != _MAGIC:
        raise Damaged("it is not a PyTorch file")
    version, at = read(mapping, at)
    system, at = read(mapping, at)
    if version != 1001 or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Damaged("it is of an unknown old version, or its numbers are big-endian")
    content, at = read(mapping, at)
    keys, at = read(mapping, at)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(set(keys)) != len(keys):
        raise Damaged("the list of its storages is damaged")
    storages = _storages(content)
    runs = {}
    for key in keys:
        storage = storages.get(key)
        if storage is None:
            raise Damaged(f"its storage {shown(key)!r} belongs to no tensor")
        count = int.from_bytes(mapping[at : at + 8], "little")
        size = count * (1 if storage.dtype is None else storage.dtype.itemsize)
        if count != storage.count or at + 8 + size > len(mapping):
            raise Damaged(
                f"its storage {shown(key)!r} has {count:,} numbers, expected {storage.count:,}: it is cut short"
            )
        runs[key] = Record(at + 8, size, size, _STORED, 0)
        at += 8 + size
    return content, runs


def _storages(content) -> dict[str, Storage]:
    """{key: storage} of every tensor anywhere in the content."""
    found, seen, waiting = {}, set(), [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Place):
            found[value.storage.key] = value.storage
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return found
