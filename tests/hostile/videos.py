"""Videos that are damaged, change their size, go on without a frame, or are scripts that name other files."""

import io
import json
import tempfile
from fractions import Fraction
from functools import cache
from pathlib import Path
from random import Random

import av
import numpy as np
import torch

from tests.hostile.cases import Case
from tests.hostile.damage import damaged
from turbo_core.pipeline.video import write_video

_COUNT = 9  # frames of a good one; the door wants five


@cache
def good(suffix: str) -> bytes:
    frames = torch.randint(0, 255, (_COUNT, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x.{suffix}"
        write_video(path, frames, made={"seed": 0})
        return path.read_bytes()


@cache
def _picture(width: int, height: int) -> bytes:
    """A frame of motion JPEG."""
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = width, height, "yuvj420p", Fraction(1, 16)
    frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 90, np.uint8), format="rgb24")
    frame.pts = 0
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame.reformat(format="yuvj420p")), *encoder.encode()])


def muxed(pictures: list[bytes]) -> bytes:
    """Motion JPEG in Matroska, each frame as it is."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=16)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p"
        for number, picture in enumerate(pictures):
            packet = av.Packet(picture)
            packet.stream, packet.pts, packet.dts = stream, number, number
            packet.time_base, packet.is_keyframe = Fraction(1, 16), True
            container.mux(packet)
    return file.getvalue()


def _sized(picture: bytes, width: int, height: int) -> bytes:
    """The picture, saying of itself that it is so large."""
    at = picture.index(b"\xff\xc0") + 5
    return picture[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + picture[at + 4 :]


def video(random: Random) -> Case:
    make = random.random()
    suffix = random.choice(("mp4", "mkv", "mov"))
    if make < 0.6:
        data = damaged(random, good(suffix), random.choice((None, 400, 2000)))
        return Case("video", {f"x.{suffix}": data})
    if make < 0.7:
        change = random.randrange(1, 4)
        pictures = [_picture(48, 32)] * change + [_picture(*random.choice(((32, 48), (64, 64), (48, 16))))] * 8
        return Case("video", {f"x.{suffix}": muxed(pictures)}, refuse="its size changes")
    if make < 0.8:
        size = random.choice(((65500, 65500), (20000, 20000), (65500, 1), (16384, 16384)))
        return Case("video", {f"x.{suffix}": muxed([_sized(_picture(48, 32), *size)] * 3)}, refuse="it is too large")
    if make < 0.87:
        noise = random.randbytes(random.choice((2, 60)))
        return Case("video", {f"x.{suffix}": muxed([noise] * 30_000)}, refuse="it has no frame")
    if make < 0.9:
        return Case("video", {f"x.{suffix}": muxed([_picture(48, 32)] * 20_000)})
    script = random.choice(_SCRIPTS)
    return Case("video", {f"x.{suffix}": script, "other.mp4": good("mp4")}, refuse="it is a script")


# by which FFmpeg opens other files, or an address
_SCRIPTS = (
    b"ffconcat version 1.0\nfile other.mp4\n",
    b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nother.mp4\n#EXT-X-ENDLIST\n",
    b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period></Period></MPD>',
    b"", b"x", b"\x1a\x45\xdf\xa3", b"\0\0\0\x18ftypisom", b"RIFF\0\0\0\0AVI LIST", b"GIF89a\1\0\1\0\0\0\0;",
)  # fmt: skip


_VALUES = (
    None, True, 0, -1, 1.5, 1 << 80, "", "x", "a ship", "0-9", "9-0", "1,2,x", "0-99999999999", "832x480", "0x0", "81",
    "80", "../x", "a/b", "con", "x" * 20_000, "\x1b[2J", "\ud800", [], {}, ["a"], "true", "nan", "inf", "1e999", "auto",
    "1-1000000", "٣",
)  # fmt: skip
_COLUMNS = (
    "prompt", "name", "seed", "seeds", "image", "size", "adaptive", "frames", "steps", "sigma_max", "topk", "precision",
    "ode", "tiled", "x", "", "Prompt", "\x1b[2J",
)  # fmt: skip


def jobs(random: Random) -> Case:
    """A list of jobs for a batch, damaged or of odd values, and the manifest of an earlier one."""
    rows = [_row(random) for _ in range(random.choice((1, 3, 30)))]
    kind = random.choice(("jsonl", "csv", "txt"))
    if kind == "jsonl":
        text = "\n".join(json.dumps(row) for row in rows)
        text = random.choice(
            (text, text, text, "[" * 100_000, text + "\n{", "[1]\n3\nnull\nNaN", text.replace(":", ""))
        )
    elif kind == "csv":
        names = random.choice((["prompt", "seed"], ["prompt", "name", "seeds"], list(_COLUMNS), ["prompt", "prompt"]))
        lines = [random.choice((",", ";", "\t")).join(names)]
        lines += [",".join(f'"{row.get(name, "")}"' for name in names) for row in rows]
        text = "\n".join(lines)
        text = random.choice((text, text, text + '\n"', text + "\n" + "," * 5000, '"' * 3001, text.replace("\n", "\r")))
    else:
        text = "\n".join(str(row.get("prompt", "x")) for row in rows)
    data = text.encode("utf-8", random.choice(("surrogatepass", "replace")))
    data = damaged(random, data) if random.random() < 0.3 else data
    data = random.choice((data, data, data, b"", b"\xff\xfe" + data, b"\xef\xbb\xbf" + data, bytes(3000)))
    known = {"name": "a.mp4", "id": "0" * 16, "state": "done", "bytes": 3}
    manifest = json.dumps({**known, random.choice(list(known)): random.choice(_VALUES)}).encode()
    manifest = random.choice((manifest, damaged(random, manifest), b"[" * 100_000, b"[]\n3\n{}", b"\xff" * 50, b""))
    return Case("jobs", {f"x.{kind}": data, "out/batch.jsonl": manifest})


def _row(random):
    row = {"prompt": random.choice(("a ship", "a ship", "", *_VALUES))}
    for _ in range(random.choice((0, 1, 1, 2))):
        row[random.choice(_COLUMNS)] = random.choice(_VALUES)
    return row
