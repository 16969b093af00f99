"""Bytes flipped, cut, put in and moved."""

from random import Random


def damaged(random: Random, data: bytes, near: int | None = None) -> bytes:
    """The data after one to four injuries, or a single one that moves what lies behind it: beside another one, nobody
    could tell which of them was taken. near: mostly within so many bytes of either end, where a file describes itself.
    """
    if data and random.random() < 0.4:
        return _moved(random, data, near)
    data = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        at = _place(random, len(data), near)
        kind = random.choice(("bit", "bit", "byte", "run", "copy"))
        size = min(random.choice((1, 2, 4, 8, 50, 3000)), max(1, len(data) - at))
        if kind == "bit" and data:
            data[at] ^= 1 << random.randrange(8)
        elif kind == "byte" and data:
            data[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
        elif kind == "run":
            data[at : at + size] = random.choice((bytes(size), b"\xff" * size, random.randbytes(size)))[
                : len(data) - at
            ]
        elif data:
            source = _place(random, len(data), near)
            part = data[source : source + size]
            data[at : at + len(part)] = part
    return bytes(data)


def _moved(random, data, near):
    at, size = _place(random, len(data), near), random.choice((1, 2, 4, 8, 50, 3000))
    return random.choice(
        (
            data[:at],
            data[:at] + data[at + size :],
            data[:at] + bytes(size) + data[at:],
            data[:at] + random.randbytes(size) + data[at:],
            data[:at] + data[at : at + size] + data[at:],
        )
    )


def _place(random, size, near):
    if size == 0:
        return 0
    if near is None or random.random() < 0.2:
        return random.randrange(size)
    at = random.randrange(min(near, size))
    return at if random.random() < 0.5 else size - 1 - at
