"""What attackers and accidents found once in the readers, file by file, and what each must come to now.

Found with 40,300 inputs in November 2026. Each finding is made again here and opened in the child like any other input;
test_findings.py holds it to its words. What was no file: two writers to one name, kills, full disks are in races.py;
sources that change in tests/checkpoint/test_converting.py; long names, devices and pipes, `--json` on a full disk in
tests/test_files.py and tests/cli; arguments (`commands` below); LoRA names in words.py.
"""

import io
import struct
import zipfile
import zlib
from random import Random

import numpy as np
import torch
from PIL import Image

from tests.helpers.pickles import Call, Global, Storage, pickled, tensor, zipped
from tests.hostile import honest
from tests.hostile.archives import packed
from tests.hostile.cases import Case

_ESCAPES = "\r\x1b[2K\x1b[32mall is well\x1b[0m\x1b]0;owned\x07"


def records(data: bytes) -> list[tuple[str, bytes]]:
    """(name, bytes) of a zip."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return [(entry.filename, file.read(entry)) for entry in file.infolist()]


def _with(data, ending, content):
    """A .pth packed again with one record replaced; content: bytes, or what makes them of the old ones."""
    changed = content if callable(content) else lambda _: content
    return packed([(name, changed(old) if name.endswith(ending) else old) for name, old in records(data)])


def _pth(pickle: bytes, **more) -> bytes:
    file = io.BytesIO()
    zipped(file, pickle, {"0": bytes(64), **more})
    return file.getvalue()


def _checkpoint(data, refuse="", same=None, suffix=".pth"):
    return Case("checkpoint", {f"x{suffix}": data}, same, refuse)


def _state(refuse="", metadata=None, pth=False, base=None, **changes):
    state = {**(honest.quantized() if base is None else base), **changes}
    if pth:
        return _checkpoint(honest.pth(state), refuse)
    return _checkpoint(honest.safetensors(state, metadata or honest.CONFIG), refuse, suffix=".safetensors")


def _big_endian():
    return _checkpoint(_with(honest.pth(honest.model()), "byteorder", b"big"), "big-endian")


def _alignment():
    return _checkpoint(_with(honest.pth(honest.model()), ".storage_alignment", b"0"), same=honest.model())


def _streamed():
    return Case("honest", {"x.pth": honest.packed_again(honest.pth(honest.model()), streamed=True)}, honest.model())


def _flipped(mend):
    """One bit in the number of elements of a storage; mended: with the checksum that then fits."""

    def flip(pickle):
        at = pickle.index(b"cpu") + 3  # the count follows: an opcode, perhaps after a memo, and its bytes
        at = next(n for n in range(at, at + 12) if pickle[n : n + 1] in (b"K", b"M", b"J"))
        return pickle[: at + 1] + bytes([pickle[at + 1] ^ 0x10]) + pickle[at + 2 :]

    data = honest.pth(honest.quantized())
    if mend:
        return _checkpoint(_with(data, "data.pkl", flip), "a record is not as long as its numbers")
    old = dict(records(data))[next(name for name, _ in records(data) if name.endswith("data.pkl"))]
    return _checkpoint(data.replace(old, flip(old)), "its checksum is another one")


def _shared_dictionaries():
    """A thousand keys that hold one dictionary of a thousand keys, and again: counted one by one, 10^9."""
    names = [pickled(f"k{n}")[2:-1] for n in range(1000)]
    first = b"".join(name + (pickled(tensor())[2:-1] if n == 0 else b"N") for n, name in enumerate(names))
    body = b"}" + pickled("l0")[2:-1] + b"}(" + first + b"uq\0s"
    for level in (1, 2):
        within = b"".join(name + b"h" + bytes([level - 1]) for name in names)
        body += pickled(f"l{level}")[2:-1] + b"}(" + within + b"uq" + bytes([level]) + b"s"
    return _checkpoint(_pth(b"\x80\x02" + body + b"."), "no model")


def _beside(value):
    """Something beside a tensor that is costly to make."""
    return _checkpoint(_pth(pickled({"a": tensor(), "x": value})), "no model")


def _hex():
    value = Call(Global("_codecs", "encode"), ("ab" * 50, "latin1"))
    for _ in range(27):
        value = Call(Global("_codecs", "encode"), (value, "hex"))
    return _beside(value)


def _punycode():
    text = "".join(chr(0x4E00 + n * 7919 % 20000) for n in range(60000))
    return _beside(Call(Global("_codecs", "encode"), (text, "punycode")))


def _tuple_as_key():
    """A key of pairs of pairs, 64 deep, whose hash takes 2^64 steps."""
    key = b")q\0" + b"0h\0h\0\x86q\0" * 64
    state = key + b"N" + pickled("a")[2:-1] + pickled(tensor())[2:-1]
    return _checkpoint(_pth(b"\x80\x02}(" + state + b"u."), "no model")


def _stride_0():
    """Every tensor one number, expanded; a comfy_quant of 10^9 bytes that is one byte."""
    state = {
        name: tensor(tuple(value.shape), (0,) * value.ndim, storage=Storage(count=1))
        for name, value in honest.model().items()
    }
    state["blocks.0.ffn.0.comfy_quant"] = tensor((10**9,), (0,), storage=Storage("1", 1, "ByteStorage"))
    return _checkpoint(_pth(pickled(state), **{"0": bytes(4), "1": b"{"}), "no tensors")


def _two_directories():
    """A pickle of 1.4 GB, which the directory that another reader takes calls short."""
    pack, size, crc, chunks = zlib.compressobj(1, wbits=-15), 0, 0, []
    text = 1400 << 20
    pieces = [b"\x80\x02}" + pickled("s")[2:-1] + b"X" + struct.pack("<I", text), *[b"a" * (1 << 20)] * 1400]
    pieces.append(b"s" + pickled("a")[2:-1] + pickled(tensor())[2:-1] + b"s.")
    for piece in pieces:
        chunks.append(pack.compress(piece))
        size, crc = size + len(piece), zlib.crc32(piece, crc)
    data = b"".join(chunks) + pack.flush()
    whole = packed([("a/byteorder", b"little"), ("a/data/0", bytes(64)), ("a/version", b"3\n")])
    end = whole.rfind(b"PK\5\6")
    count, length, start = struct.unpack("<H2L", whole[end + 10 : end + 20])
    name, fields = b"a/data.pkl", struct.pack("<5H3L2H", 20, 0, 8, 0, 33, crc, len(data), size, 10, 0)
    local, body = b"PK\3\4" + fields + name + data, whole[:start]
    entry = b"PK\1\2" + struct.pack("<H", 20) + fields + struct.pack("<3H2L", 0, 0, 0, 0, len(body)) + name
    good, directory = len(body) + len(local), whole[start : start + length] + entry
    fake = directory.replace(fields, struct.pack("<5H3L2H", 20, 0, 0, 0, 33, crc, len(data), len(data), 10, 0))
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count + 1, count + 1, len(directory), good, 0)
    return _checkpoint(body + local + directory + fake + last, "two directories")


def _legacy_cut():
    return _checkpoint(honest.pth({"head.modulation": torch.zeros(1, 2, 4)}, zipped=False)[:19], "cut short")


def _comfy_quant(text):
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _shown():
    return Case("shown", {"x.safetensors": honest.safetensors(honest.stock(), {**honest.CONFIG, "note": _ESCAPES})})


def _picture(data, refuse="", value=None):
    same = None if value is None else {"image": torch.full((3, 48, 64), value, dtype=torch.uint8)}
    return Case("picture", {"x.png": data}, same, refuse)


def _grey_16():
    file = io.BytesIO()
    Image.fromarray(np.full((48, 64), 20000, np.uint16)).save(file, "PNG")
    return _picture(file.getvalue(), value=round(20000 / 65535 * 255))


def _png(width, height, data):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def _vae():
    state = dict(honest.vae())
    state["decoder.head.2.bias"] = state["decoder.head.2.bias"] * float("nan")
    case = _generate()
    return case._replace(files={**case.files, "vae.pth": honest.pth(state)})


_QUERY = "encoder.block.1.layer.0.SelfAttention.q.weight"


def _encoder(state, spiece=None, refuse="it is none"):
    spiece = honest.spiece() if spiece is None else spiece
    return Case("encoder", {"x.safetensors": honest.safetensors(state), "spiece.model": spiece}, refuse=refuse)


def _encoder_without():
    return _encoder({name: value for name, value in honest.encoder().items() if name != _QUERY}, refuse="q is missing")


def _encoder_scale():
    state = dict(honest.encoder())
    state[_QUERY] = state[_QUERY].to(torch.float8_e4m3fn)
    state[_QUERY.replace("weight", "scale_weight")] = torch.full((64, 64), 2.0)
    return _encoder(state, refuse="the scale is of the weight's shape")


def _scale(change):
    """Told when it is loaded, and never converted."""
    name = "blocks.0.ffn.0.scale"
    state = {**honest.quantized(), name: change(honest.quantized()[name])}
    return Case("finite", {"x.pth": honest.pth(state)})


def _empty():
    state = {}
    for name, value in honest.model().items():
        state[name] = torch.zeros([0 if size == honest.SIZES.dim else size for size in value.shape])
    return _checkpoint(honest.pth(state), "it has no channels")


def _merge():
    """A tensor beside the weights, of another shape in each: left out with a word, or an error."""
    files = {"a.safetensors": honest.safetensors({**honest.stock(0), "x": torch.ones(4)}, honest.CONFIG)}
    files["b.safetensors"] = honest.safetensors({**honest.stock(1), "x": torch.ones(1)}, honest.CONFIG)
    files["c.pth"] = honest.pth({**honest.model(2), "x": torch.ones(3)})
    return Case("merge", files, arguments=("bf16", 1.0))


def _negative():
    name = "blocks.0.ffn.0.bias"
    count = honest.model()[name].numel()
    flagged = torch.complex(torch.zeros(count), torch.ones(count)).conj().imag  # a view with its sign in a bit
    assert flagged.is_neg()
    data = honest.pth({**honest.model(), name: flagged})
    return Case("honest", {"x.pth": data}, {**honest.model(), name: -torch.ones(count)})


def _command(*words):
    files = {"model.pth": honest.pth(honest.stock()), "vae.pth": honest.pth(honest.vae())}
    files |= {"encoder.pth": honest.pth(honest.official_encoder()), "spiece.model": honest.spiece()}
    return Case("command", files, arguments=words)


def _generate(*words, prompt="a ship"):
    models = ("--dit=model.pth", "--vae=vae.pth", "--text-encoder=encoder.pth", "--tokenizer=spiece.model")
    small = ("--size=16x16", "--frames=1", "--steps=1", "--dtype=float32", "--device=cpu")
    return _command("generate", "--prompt", prompt, *models, *small, "-o", "out.mp4", *words)


FINDINGS = {  # {what: (what makes the case, what its message must hold; "" where the input is right, or harmless)}
    "big-endian": (_big_endian, "big-endian"),
    "alignment 0": (_alignment, ""),
    "packed again, streamed": (_streamed, ""),
    "one flipped bit": (lambda: _flipped(False), "checksum"),
    "one flipped bit, mended": (lambda: _flipped(True), "numbers have"),
    "shared dictionaries": (_shared_dictionaries, "not a Wan"),
    "bytearray of 4 GB": (lambda: _beside(Call(Global("builtins", "bytearray"), (4 * 10**9,))), "not a Wan"),
    "hex 27 times": (_hex, "refused"),
    "punycode": (_punycode, "refused"),
    "tuple as key": (_tuple_as_key, "refused"),
    "stride 0": (_stride_0, "does not lie within"),
    "two directories": (_two_directories, "directory"),
    "blocks.x": (lambda: _state("it is no weight", base=honest.stock(), **{"blocks.x": torch.ones(1)}), "blocks.x"),
    "old format, cut": (_legacy_cut, "ends"),
    "pickle, cut": (lambda: _checkpoint(_pth(b"\x80\x02}J\x01"), "cut"), "ends"),
    "format is a list": (
        lambda: _state(
            "no format", base=honest.stock(), **{"blocks.0.ffn.0.comfy_quant": _comfy_quant(b'{"format":[]}')}
        ),
        r"quantized as '\[\]'",
    ),
    "deep JSON": (lambda: _state("no JSON", {"config": "[" * 100000}, base=honest.stock()), "JSON"),
    "named __metadata__": (lambda: _state("no name", pth=True, __metadata__=torch.ones(4)), "__metadata__"),
    "lone surrogate": (lambda: _state("no name", pth=True, **{"\ud800": torch.ones(4)}), "no file can name"),
    "complex": (lambda: _state("no type", pth=True, x=torch.ones(3, dtype=torch.complex64)), "complex64"),
    "escapes in a name": (lambda: _state("no name", pth=True, **{_ESCAPES: torch.ones(1)}), r"\\x1b"),
    "escapes in metadata": (_shown, ""),
    "16-bit grey": (_grey_16, ""),
    "PostScript called .png": (
        lambda: _picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n", "code"),
        "PNG",
    ),
    "bomb of 13300 x 13300": (lambda: _picture(_png(13300, 13300, bytes(13300 * 40000)), "too large"), "pixels"),
    "a few bytes of 2 GB": (lambda: _picture(_png(26000, 26000, b"\0"), "too large"), "pixels"),
    "NaN in the VAE": (_vae, "NaN"),
    "OpenCLIP": (
        lambda: _encoder({"token_embedding.weight": torch.ones(8, 4), "positional_embedding": torch.ones(77, 4)}),
        "not a umT5",
    ),
    "empty spiece.model": (lambda: _encoder(honest.official_encoder(), b""), "sentencepiece"),
    "encoder without its last q": (_encoder_without, "lacks"),
    "encoder's scale 64 x 64": (_encoder_scale, "scale"),
    "int8 head": (
        lambda: _state("no type", pth=True, **{"head.head.weight": honest.model()["head.head.weight"].to(torch.int8)}),
        "head.head.weight",
    ),
    "bool projection": (
        lambda: _state(
            "no type", pth=True, **{"time_projection.1.weight": honest.model()["time_projection.1.weight"].bool()}
        ),
        "time_projection.1.weight",
    ),
    "float64 scale": (lambda: _scale(lambda scale: scale.double() * 0 + 1e300), "finite|infinity"),
    "negative scale": (lambda: _scale(lambda scale: -scale), "negative"),
    "dim 0": (_empty, "empty|shape"),
    "protocol 4": (lambda: Case("honest", {"x.pth": honest.pth(honest.model(), protocol=4)}, honest.model()), ""),
    "merge with extras": (_merge, "x"),
    "negative bit": (_negative, ""),
    "a name of 300 letters": (
        lambda: _command("convert", "model.pth", f"{'x' * 300}.safetensors", "--format=bf16"),
        "too long",
    ),
    "seed 2^64": (lambda: _generate(f"--seed={2**64}"), "seed"),
    "frames 1e9": (lambda: _generate("--frames=1000000001"), "frames|memory"),
    "memory inf": (lambda: _command("plan", "model.pth", "--memory=inf"), "memory"),
    "a prompt that is no UTF-8": (lambda: _generate(prompt="\ud800"), "prompt"),
    "a sheet that cannot be written": (lambda: _generate("--contact-sheet=x.psd"), "psd"),
    "a LoRA name of 100 kB": (lambda: Case("lora", arguments=("lora_unet__" + "blocks_0_" * 11_000,)), "for Wan"),
}  # fmt: skip


def finding(random: Random) -> Case:
    return FINDINGS[random.choice(list(FINDINGS))][0]()
