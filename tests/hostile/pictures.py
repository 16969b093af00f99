"""Pictures that are damaged, huge, or none."""

import io
import struct
import zlib
from functools import cache
from random import Random

import numpy as np
from PIL import Image

from tests.hostile.cases import Case
from tests.hostile.damage import damaged

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF")
_MODES = {
    "PNG": ("RGB", "RGBA", "L", "P", "1", "I;16", "LA"),
    "JPEG": ("RGB", "L", "CMYK"),
    "BMP": ("RGB", "L", "1", "P"),
}
_MODES |= {
    "WEBP": ("RGB", "RGBA"),
    "TIFF": ("RGB", "L", "1", "I;16", "F", "CMYK", "LAB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
}
_SIZES = (0, 1, 7, 65535, 65536, 1 << 24, 0x7FFFFFFF, 0xFFFFFFFF)


@cache
def _good(kind: str, mode: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 200)
    elif mode == "LAB":
        image = Image.frombytes("LAB", image.size, image.tobytes())
    elif mode != "RGB":
        image = image.convert(mode)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    compressed = {"compression": "tiff_lzw"} if kind == "TIFF" and mode == "L" else {}
    image.save(file, kind, **compressed, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
    return file.getvalue()


def picture(random: Random) -> Case:
    kind = random.choice(_FORMATS)
    data = _good(kind, random.choice(_MODES[kind]))
    make = random.random()
    if make < 0.6:
        data = damaged(random, data, random.choice((None, 100)))
    elif make < 0.75:
        data = _resized(random, kind, data)
    elif make < 0.85:
        data = _bomb(random)
    else:
        return Case("picture", {"picture.png": _foreign(random)}, refuse="not of a format that is read")
    return Case("picture", {f"picture.{random.choice((kind, 'png', 'jpg', 'eps')).lower()}": data})


def _resized(random, kind, data):
    """The size that a header claims."""
    data, size = bytearray(data), random.choice(_SIZES)
    if kind == "PNG":
        at = 16 + 4 * random.randrange(2)
        data[at : at + 4] = struct.pack(">I", size)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "BMP":
        at = 18 + 4 * random.randrange(2)
        data[at : at + 4] = struct.pack("<I", size)
    elif kind == "TIFF":
        at = struct.unpack("<I", data[4:8])[0]
        for entry in range(struct.unpack("<H", data[at : at + 2])[0]):
            place = at + 2 + 12 * entry
            if random.random() < 0.2:
                data[place + 8 : place + 12] = struct.pack("<I", size)
    else:
        at = random.randrange(12, min(300, len(data) - 2))
        data[at : at + 2] = struct.pack(">H", size & 0xFFFF)
    return bytes(data)


def _chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@cache
def _packed_zeros(size):
    return zlib.compress(bytes(size), 9)


def _bomb(random):
    """A PNG of some bytes that is millions of pixels, or whose texts or profiles unpack to as much."""
    side = random.choice((3000, 9000, 11000, 30000, 65000))
    head = _chunk(b"IHDR", struct.pack(">2I5B", side, side, 8, random.choice((0, 2, 6)), 0, 0, 0))
    more = random.choice(
        (b"", _chunk(b"zTXt", b"a\0\0" + _packed_zeros(1 << 27)), _chunk(b"iCCP", b"a\0\0" + _packed_zeros(1 << 27)))
    )
    return b"\x89PNG\r\n\x1a\n" + head + more + _chunk(b"IDAT", _packed_zeros(1 << 24)) + _chunk(b"IEND", b"")


def _foreign(random):
    image = Image.new("RGB", (16, 16))
    file = io.BytesIO()
    kind = random.choice(("GIF", "PPM", "TGA", "PCX", "ICO", "PDF", "EPS", "SGI", "DDS", "JPEG2000"))
    if kind in ("GIF", "PPM", "TGA", "PCX", "ICO", "PDF", "SGI", "DDS"):
        image.save(file, kind)
    return file.getvalue() or random.choice(
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(x) = showpage\n%%EOF\n",
            b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
            b"II*\0" + bytes(20),
            b"",
            random.randbytes(100),
            b"RIFF\xff\xff\xff\xffWEBPVP8X" + bytes(30),
        )
    )
