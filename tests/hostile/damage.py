"""Bytes flipped, cut, put in and moved."""

from random import Random


def damaged(random: Random, data: bytes, near: int | None = None):
    """(data after one to four injuries, the bytes that they touched or None where the length changed).

    near: keep to so many bytes at either end, where a file describes itself.
    """
    data, touched = bytearray(data), []
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = _place(random, len(data), near)
        kind = random.choice(("bit", "bit", "byte", "run", "cut", "insert", "remove", "move"))
        size = min(random.choice((1, 2, 4, 8, 50, 3000)), max(1, len(data) - at))
        if kind == "bit" and data:
            data[at] ^= 1 << random.randrange(8)
            touched.append((at, at + 1))
        elif kind == "byte" and data:
            data[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
            touched.append((at, at + 1))
        elif kind == "run":
            data[at : at + size] = random.choice((bytes(size), b"\xff" * size, random.randbytes(size)))[
                : len(data) - at
            ]
            touched.append((at, at + size))
        elif kind == "move":
            source = _place(random, len(data), near)
            part = data[source : source + size]
            data[at : at + len(part)] = part
            del data[max(at + len(part), len(data)) :]
            touched.append((at, at + len(part)))
        elif kind == "cut":
            del data[at:]
            touched.append(None)
        elif kind == "insert":
            data[at:at] = random.choice((bytes(size), random.randbytes(size), bytes(data[at : at + size])))
            touched.append(None)
        else:
            del data[at : at + size]
            touched.append(None)
    return bytes(data), None if None in touched else touched


def only_within(touched, places) -> bool:
    """Were only bytes of these places touched?"""
    return touched is not None and all(any(a <= start and end <= b for a, b in places) for start, end in touched)


def _place(random, size, near):
    if size == 0:
        return 0
    if near is None or random.random() < 0.2:
        return random.randrange(size)
    at = random.randrange(min(near, size))
    return at if random.random() < 0.5 else size - 1 - at
