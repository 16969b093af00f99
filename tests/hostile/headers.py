"""safetensors headers and the JSON in metadata, as a stranger may write them."""

import copy
import json
from random import Random

from tests.hostile import honest
from tests.hostile.cases import Case

_ANY = (
    0, 1, -1, 4.0, 1e300, 1 << 40, 1 << 64, True, None, "", "F32", "BF16", [], {}, [[]], [0, 0], [1, 2, 3], "\x1b[2J",
    "x" * 5000, [1] * 20, {"dtype": "F32"}, float("nan"), "\ud800",
)  # fmt: skip
_TYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F4",
    "C64",
    "",
    None,
    3,
)
_METADATA = (
    "config",
    "_quantization_metadata",
    "turbowan.format",
    "turbowan.version",
    "turbowan.world",
    "format",
    "note",
)


def header(random: Random) -> Case:
    """Entries of the header changed, or its bytes; what is taken is what the safetensors library reads."""
    base = random.choice(honest.headers())
    size = int.from_bytes(base.data[:8], "little")
    entries, data = json.loads(base.data[8 : 8 + size]), base.data[8 + size :]
    for _ in range(random.choice((0, 0, 1, 1, 2, 5))):
        _change(random, entries)
    text = json.dumps(entries).encode()
    text = random.choice((text, text, text, _other_text(random, text)))
    text += b" " * random.choice((0, -len(text) % 8, 1000))
    length = (
        len(text)
        if random.random() < 0.85
        else random.choice((0, 1, 7, len(text) - 1, len(text) + 8, 1 << 40, (1 << 64) - 1))
    )
    data = random.choice((data, data, data, data[:-1], data + b"\0", b""))
    return Case("header", {base.name: length.to_bytes(8, "little") + text + data})


def _change(random, entries):
    name = random.choice(list(entries) or ["x"])
    entry = entries.get(name)
    kind = random.choice(("dtype", "shape", "size", "offsets", "offset", "entry", "name", "new", "gone", "metadata"))
    if kind == "metadata":
        entries["__metadata__"] = random.choice((*_ANY, _metadata(random)))
    elif kind == "new":
        entries[
            random.choice(("x", "__metadata__", "", "\x1b[2J", "\ud800", "head.modulation.", "blocks.x", "y" * 9000))
        ] = random.choice((*_ANY, {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}))
    elif kind == "gone":
        entries.pop(name, None)
    elif kind == "name":
        entries[random.choice((name + " ", name.upper(), name[1:], "model." + name))] = entries.pop(name, None)
    elif kind == "entry" or not isinstance(entry, dict):
        entries[name] = random.choice(_ANY)
    elif kind == "dtype":
        entry["dtype"] = random.choice(_TYPES)
    elif kind in ("size", "offset"):
        values = entry.get("shape" if kind == "size" else "data_offsets")
        if isinstance(values, list) and values:
            at = random.randrange(len(values))
            values[at] = random.choice((*_ANY[:8], values[at] + 1 if isinstance(values[at], int) else 0))
    else:
        entry["shape" if kind == "shape" else "data_offsets"] = copy.deepcopy(random.choice(_ANY))


def _other_text(random, text):
    return random.choice(
        (
            text[:-1],
            text + b"}",
            text + b"\0",
            b"[" * random.choice((100, 100_000)),
            b'{"a":' * 3000,
            text.replace(b'"dtype"', b'"dtype": "F32", "dtype"', 1),
            text[:-1] + b', "head.modulation": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
            text.decode().encode("utf-16"),
            b"\xef\xbb\xbf" + text,
            text.replace(b"[", b"[1e3, ", 1),
            b'{"a": ' + b"9" * 5000 + b"}",
            b"{}",
        )
    )


def _metadata(random):
    return {random.choice(_METADATA): _value(random) for _ in range(random.choice((1, 2, 4)))}


def _value(random):
    inner = random.choice(("num_heads", "text_dim", "layers", "transformer"))
    value = random.choice((*_ANY, 64, 128, "2"))
    deep = random.choice(
        ({inner: value}, {"transformer": {inner: value}}, {"layers": {"blocks.0.ffn.0": value}}, value)
    )
    return random.choice(
        (json.dumps(deep), json.dumps(deep), "[" * 100_000, "{", "", "9" * 5000, "x" * 20000, "2", deep)
    )


def metadata(random: Random) -> Case:
    """A whole model with any metadata: it may be taken, and then its weights are right."""
    base = random.choice(honest.headers())
    given = {name: value if isinstance(value, str) else json.dumps(value) for name, value in _metadata(random).items()}
    given = {name: value.encode("utf-8", "replace").decode() for name, value in given.items()}
    return Case("checkpoint", {base.name: honest.safetensors(base.state, given)}, base.state)
