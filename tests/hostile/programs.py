"""Pickles as nobody writes them: random programs over all opcodes, payloads, names, deep and large things."""

import pickletools
import struct
from random import Random

from tests.helpers.pickles import Call, Global, Raw, Storage, pickled, tensor
from tests.hostile import honest
from tests.hostile.archives import packed
from tests.hostile.cases import Case

CANARY = "turbowan_canary"  # a module that the child can import, which then tells of it
HARMFUL = (
    ("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"), ("builtins", "open"),
    ("__builtin__", "eval"), ("subprocess", "Popen"), ("subprocess", "check_output"), ("builtins", "__import__"),
    ("importlib", "import_module"), ("torch", "load"), ("torch.hub", "load"), ("torch.jit", "load"),
    ("torch.utils.cpp_extension", "load"), ("socket", "create_connection"), ("shutil", "rmtree"), ("pickle", "loads"),
    ("runpy", "run_path"), ("webbrowser", "open"), ("builtins", "getattr"), ("operator", "attrgetter"),
    ("functools", "partial"), ("numpy", "load"), ("numpy.core.multiarray", "_reconstruct"), ("types", "CodeType"),
    ("torch", "ops.aten"), ("torch._utils", "_rebuild_tensor_v2.__globals__"), ("torch.storage", "_load_from_bytes"),
    ("ctypes", "CDLL"), (CANARY, "run"), (f"{CANARY}.inner", "run"), ("site", "main"), ("bdb", "Bdb"), ("code",
    "interact"),
)  # fmt: skip
ALLOWED = (
    ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor"), ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor_v3"), ("torch._tensor", "_rebuild_from_type_v2"), ("collections", "OrderedDict"),
    ("torch", "FloatStorage"), ("torch", "BFloat16Storage"), ("torch", "QInt8Storage"), ("torch.storage",
    "UntypedStorage"),
    ("torch", "float32"), ("torch", "Size"), ("torch", "device"), ("builtins", "set"), ("builtins", "bytearray"),
    ("builtins", "complex"), ("collections", "Counter"), ("_codecs", "encode"), ("torch._utils", "_rebuild_qtensor"),
    ("torch.nn.parameter", "Parameter"), ("torch._utils", "_rebuild_sparse_tensor"), ("torch.serialization",
    "_get_layout"),
)  # fmt: skip
_INTEGERS = (0, 1, 2, -1, 255, 256, 1 << 16, (1 << 31) - 1, -(1 << 31), 1 << 40, 1 << 62, 1 << 63, 1 << 64, -(1 << 200))
_TEXTS = (
    "a",
    "",
    "0",
    "storage",
    "cpu",
    "latin1",
    "hex",
    "os",
    "system",
    "\ud800",
    "\x1b[2J",
    "x" * 300,
    "head.modulation",
)


def program(random: Random) -> Case:
    """A random program, in a zip, in the old format or alone. It is no model, whatever it makes."""
    code = b"\x80" + bytes([random.choice((0, 2, 2, 2, 3, 4, 5, 9, 255))])
    code += random.choice((b"", b"}(", b"}(X\1\0\0\0a", b"(", b"]", b")"))
    code += b"".join(_step(random) for _ in range(random.choice((1, 4, 12, 40, 200))))
    code += random.choice((b".", b".", b".", b"u.", b"t.", b"", b"s."))
    return _placed(random, code)


def _placed(random, code):
    where = random.random()
    if where < 0.6:
        records = [("archive/data.pkl", code), ("archive/byteorder", b"little"), ("archive/data/0", bytes(64))]
        data = packed(records)
    elif where < 0.85:
        first = honest.legacy()[0].data
        data = first[: first.index(b"type_sizes") - 60] + code  # somewhere in the third pickle
        data = random.choice((data, first[:16] + code, first[:2] + code))
    else:
        data = code
    return Case("checkpoint", {"program.pth": data}, refuse="no model")


def _step(random) -> bytes:
    """One opcode with an argument of its kind."""
    code = random.choice(pickletools.opcodes)
    if random.random() < 0.3:
        code = pickletools.code2op[random.choice("\x93cRQb}]()\x85\x86\x87utsae2\x940qhpg\x81")]
    raw = code.code.encode("latin1")
    if code.arg is None:
        return raw
    if raw == b"c" or raw == b"i":
        module, name = random.choice(ALLOWED + HARMFUL)
        return raw + f"{module}\n{name}\n".encode()
    return raw + _argument(random, code.arg)


def _argument(random, arg) -> bytes:
    number, text = random.choice(_INTEGERS), random.choice(_TEXTS).encode("utf-8", "surrogatepass")
    name = arg.name
    if name in ("decimalnl_short", "decimalnl_long"):
        return random.choice(
            (b"%d\n" % number, b"%dL\n" % number, b"9" * 5000 + b"\n", b"00\n", b"01\n", b"x\n", b"-\n")
        )
    if name == "floatnl":
        return random.choice((b"1.5\n", b"nan\n", b"1e999\n", b"x\n", b"1_0\n"))
    if name in ("stringnl", "stringnl_noescape"):
        return random.choice((b"'a'\n", b'"os"\n', b"'\\x00'\n", b"'\n", text + b"\n"))
    if name in ("unicodestringnl", "stringnl_noescape_pair"):
        return text + b"\n" + (b"x\n" if name.endswith("pair") else b"")
    sizes = {"uint1": 1, "uint2": 2, "uint4": 4, "int4": 4, "uint8": 8, "float8": 8}
    if name in sizes:
        return (number % (1 << 8 * sizes[name])).to_bytes(sizes[name], "little")
    if name in ("long1", "long4"):
        digits = random.choice((0, 1, 4, 8, 64, 65, 200))
        return struct.pack("<B" if name == "long1" else "<I", digits) + random.randbytes(digits)
    form = {"1": "<B", "4": "<I", "8": "<Q"}[name[-1]]
    most = {"<B": 255, "<I": (1 << 32) - 1, "<Q": (1 << 64) - 1}[form]
    return struct.pack(form, random.choice((min(len(text), most), min(len(text), most), most, 0))) + text


def payload(random: Random) -> Case:
    """A whole model, with something beside it that asks for code: it must be refused by name."""
    module, name = random.choice(HARMFUL)
    harmful = Global(module, name)
    value = random.choice(
        (
            harmful,
            Call(harmful, ("touch turbowan-canary",)),
            [Call(harmful, ("turbowan-canary", "w"))],
            {"x": (1, Call(harmful, ()))},
            Raw(f"(S'touch turbowan-canary'\ni{module}\n{name}\n".encode()),
            Raw(_text(module) + _text(name) + b"\x93" + _text("touch turbowan-canary") + b"\x85R"),
            Raw(f"c{module}\n{name}\n)\x81}}b".encode()),
            Raw(f"(c{module}\n{name}\n".encode() + _text("touch turbowan-canary") + b"o"),
            Call(Global("torch._tensor", "_rebuild_from_type_v2"), (harmful, Global("torch", "Tensor"), (), {})),
            Raw(f"ccollections\nOrderedDict\n)R}}{_quoted('x')}c{module}\n{name}\nsb".encode("latin1")),
            Raw(b"Pturbowan\n"),
            Raw(b"\x82\x01"),
        )
    )
    before = random.random() < 0.5
    content = {"extra": value, **_tensors()} if before else {**_tensors(), "extra": value}
    data = packed(_archive(content))
    if random.random() < 0.2:
        data = pickled({"extra": value})
    return Case("checkpoint", {"payload.pth": data}, refuse="it names code")


def aside(random: Random) -> Case:
    """A whole model with large, deep or odd things beside it, or described in odd ways: it may be taken, and then its
    weights are right."""
    content = _tensors()
    for _ in range(random.choice((1, 1, 2))):
        content[random.choice(("extra", "step", "\ud800", "__metadata__", "x" * 70000, "\x1b]0;x\7"))] = _odd(random)
    if random.random() < 0.5:
        name = random.choice(list(honest.model()))
        content[name] = _described(random, name)
    return Case("checkpoint", {"aside.pth": packed(_archive(content))}, _floats())


def _odd(random):
    number = random.choice(_INTEGERS[:-1])
    deep = random.choice((100, 5000, 100_000))
    wide = b"".join(_text(f"k{i}") + b"N" for i in range(1000))
    return random.choice(
        (
            number,
            Raw(b"]" * deep + b"a" * (deep - 1)),
            Raw(b"N" + b"\x85" * deep),
            Raw(b"}(" + wide + b"uq\0" + b"0}(" + wide.replace(b"N", b"h\0") + b"u"),
            Raw(b"}q\x05(" + _text("me") + b"h\x05u"),
            Raw(b"]q\x05h\x05a"),
            Call(
                Global("_codecs", "encode"), ("ab" * 1000, random.choice(("latin1", "hex", "punycode", "utf-7", "zip")))
            ),
            Call(Global("builtins", "bytearray"), (number,)),
            Call(Global("builtins", "set"), ([1, 2],)),
            Call(Global("collections", "OrderedDict"), ([("a", 1)],)),
            Call(Global("collections", "OrderedDict"), (number,)),
            Call(Global("torch", "Size"), ((number, number),)),
            Call(Global("torch", "Size"), (number,)),
            tensor((number,) if number >= 0 else (4,), storage=Storage("0", 4)),
            tensor((4,), (random.choice((0, 1, 1 << 40)),), number, Storage("0", max(number, 0))),
            tensor((2,) * random.choice((1, 17, 100)), storage=Storage("0", 4)),
            Call(Global("torch._utils", "_rebuild_qtensor"), (number,)),
            (("a",), number, "text", None, True),
            {number: {number: number}},
            {(1, 2): 3, None: 4},
        )
    )


def _described(random, name):
    """A tensor of the model over its own record, by other numbers."""
    index, given = list(honest.model()).index(name), honest.model()[name]
    count = given.numel()
    return random.choice(
        (
            tensor(tuple(given.shape), storage=Storage(str(index), count, "FloatStorage")),
            tensor(tuple(given.shape), storage=Storage(str(index), count, "BFloat16Storage")),
            tensor(tuple(given.shape), storage=Storage(str(index), count - 1)),
            tensor(tuple(given.shape), storage=Storage(str(index), count, random.choice(("HalfStorage",
            "QInt8Storage")))),
            tensor(tuple(given.shape), offset=1, storage=Storage(str(index), count)),
            tensor(tuple(given.shape), tuple(given.stride()[:-1]) + (2,), storage=Storage(str(index), count)),
            tensor(tuple(given.shape), storage=Storage("no", count)),
            tensor((True, *given.shape[1:]), storage=Storage(str(index), count)),
            tensor((-1, *given.shape[1:]), storage=Storage(str(index), count)),
        )
    )  # fmt: skip


def _floats():
    return {name: given.float() for name, given in honest.model().items()}


def _tensors():
    return {
        name: tensor(tuple(given.shape), storage=Storage(str(index), given.numel()))
        for index, (name, given) in enumerate(honest.model().items())
    }


def _archive(content):
    records = [("archive/data.pkl", pickled(content)), ("archive/byteorder", b"little")]
    return records + [
        (f"archive/data/{index}", given.float().contiguous().numpy().tobytes())
        for index, given in enumerate(honest.model().values())
    ]


def _text(text):
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _quoted(text):
    return _text(text).decode("latin1")
