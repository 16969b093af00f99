"""Checkpoints whose zip is not what it says: fields of its directory, doubles, bombs, and honest repacks."""

import io
import struct
import warnings
import zipfile
from random import Random

from tests.helpers.pickles import pickled, tensor
from tests.hostile import honest
from tests.hostile.cases import Case
from tests.hostile.damage import damaged

_END, _ENTRY, _LOCAL = b"PK\5\6", b"PK\1\2", b"PK\3\4"
_NUMBERS = (0, 1, 2, 8, 9, 12, 20, 64, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def archive(random: Random) -> Case:
    base = random.choice(honest.zips())
    make = random.choice((_field, _field, _field, _field, _two_directories, _double, _edge, _named, _bomb, _honest))
    return make(random, base)


def _field(random, base):
    """One to three numbers in the directory, its end, or the headers of records."""
    data = bytearray(base.data)
    for _ in range(random.choice((1, 1, 2, 3))):
        mark, fields = random.choice(
            (
                (_END, ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2))),
                (_ENTRY, ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4))),
                (_LOCAL, ((6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2))),
            )
        )
        places = _all(data, mark)
        at, (offset, size) = random.choice(places), random.choice(fields)
        old = int.from_bytes(data[at + offset : at + offset + size], "little")
        new = random.choice((*_NUMBERS, old + 1, old - 1, old + 4, old - 4, old + 64, old - 64, random.getrandbits(32)))
        data[at + offset : at + offset + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
    return Case("checkpoint", {base.name: bytes(data)}, base.state)


def _all(data, mark):
    places, at = [], data.find(mark)
    while at >= 0:
        places.append(at)
        at = data.find(mark, at + 1)
    return places


def _two_directories(random, base):
    """A directory in front of the one that counts, of other records."""
    end = base.data.rfind(_END)
    size, start = struct.unpack("<2L", base.data[end + 12 : end + 20])
    other = bytearray(base.data[start : start + size])
    other[random.choice((10, 16, 20, 24))] ^= 1 << random.randrange(8)
    data = base.data[:end] + bytes(other) + base.data[end:]
    if random.random() < 0.5:  # the end names the first of both
        return Case("checkpoint", {base.name: data}, refuse="two directories")
    end = bytearray(base.data[end:])
    end[16:20] = struct.pack("<L", start + size)
    return Case("checkpoint", {base.name: base.data[: start + size] + bytes(other) + bytes(end)}, base.state)


def _records(base):
    with zipfile.ZipFile(io.BytesIO(base.data)) as file:
        return [(entry.filename, file.read(entry)) for entry in file.infolist()]


def packed(records, method=zipfile.ZIP_STORED, comment=b""):
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as made:
        warnings.simplefilter("ignore")  # of names that are there twice
        made.comment = comment
        for name, data in records:
            made.writestr(name, data)
    return file.getvalue()


def _double(random, base):
    records = _records(base)
    name, data = random.choice(records)
    records.insert(random.randrange(len(records)), (name, random.choice((data, b"", bytes(len(data)), b"PK\3\4"))))
    return Case("checkpoint", {base.name: packed(records)}, refuse="a record is there twice")


def _edge(random, base):
    """Something before or behind the zip, or in its comment."""
    more = random.choice((b"\0", b"PK\5\6" + bytes(18), base.data[-22:], bytes(66000), b"\x80\x02}.", base.data))
    data = random.choice((more + base.data, base.data + more, packed(_records(base), comment=more[:60000])))
    return Case("checkpoint", {base.name: data}, base.state)


def _named(random, base):
    """Records under other names, some that must be there, in any order."""
    records = _records(base)
    for _ in range(random.choice((1, 3))):
        at = random.randrange(len(records))
        name, data = records[at]
        name = random.choice(
            (
                f"../{name}", f"/{name}", name.replace("/", "\\"), f"{name}/", "data.pkl", "a/code/x.py", "x" * 60000,
                name.upper(), "archive/byteorder", f"{name}\0", "archive/data/0", f"{name}\x1b[2J", " ", "b/data.pkl",
            )
        )  # fmt: skip
        records[at] = name, random.choice((data, data, data[:-1], b"big", b"little" * 1000, b""))
    random.shuffle(records)
    return Case("checkpoint", {base.name: packed(records)}, base.state)


def _bomb(random, base):
    count = random.choice((1 << 22, 1 << 24, 1 << 26))
    content = pickled({"a": tensor((count // 4,))})
    records = [("a/data.pkl", content), ("a/data/0", bytes(count))]
    if random.random() < 0.4:
        records[0] = "a/data.pkl", content[:2] + b"N0" * (1 << random.choice((20, 24))) + content[2:]
    return Case("checkpoint", {base.name: packed(records, zipfile.ZIP_DEFLATED)}, refuse="no model")


def _honest(random, base):
    """Packed again, as people do: these must be read right."""
    method = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    data = honest.packed_again(base.data, method=method, streamed=random.random() < 0.5)
    return Case("honest", {base.name: data}, base.state)


def zip_bytes(random: Random) -> Case:
    return _bytes(random, random.choice(honest.zips()), random.choice((None, 3000, 12000)))


def legacy_bytes(random: Random) -> Case:
    return _bytes(random, random.choice(honest.legacy()), random.choice((400, 12000, 12000)))


def header_bytes(random: Random) -> Case:
    return _bytes(random, random.choice(honest.headers()), random.choice((16, 400, 8000)))


def _bytes(random, base, near):
    data = damaged(random, base.data, near)
    # of the same length, it may be that only weights were touched
    same = base.with_bytes_of(data) if len(data) == len(base.data) else base.state
    return Case("checkpoint", {base.name: data}, same)
