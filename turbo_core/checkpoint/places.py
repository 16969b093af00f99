"""What the pickle inside a .pth may name: containers, and tensors as the places where their numbers lie."""

from typing import NamedTuple

import torch

from ..errors import shown

_MOST_AXES = 16
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
# of a storage of bytes; of others torch makes no tensor from memory, and some end the process that tries
_DTYPES = {str(dtype): dtype for dtype in (*_STORAGES.values(), torch.float8_e4m3fn, torch.float8_e5m2)}
_INERT = {str(value) for value in vars(torch).values() if isinstance(value, (torch.dtype, torch.qscheme))}
_INERT |= {"torch.Tensor", "torch.Size"}  # named in dumps, of no consequence
_QUANTIZED = ("QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage")


_NEGATED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Refused(ValueError):
    """The pickle asks for something that is no part of a dictionary of tensors; the text is its name."""


class Damaged(ValueError):
    """What is there is no pickle, or not all of one; the text says what is wrong."""


class Storage(NamedTuple):
    """A run of numbers in the file. dtype None: bytes, of which each tensor says what they are."""

    key: str
    dtype: torch.dtype | None
    count: int


class Place(NamedTuple):
    """A tensor: where it lies in its storage, in elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    negative: bool = False  # to be negated when it is read


class Unreadable(NamedTuple):
    """A tensor that is sparse, quantized by torch or without data."""

    name: str


class Global(NamedTuple):
    module: str
    name: str

    def __str__(self):
        return shown(f"{self.module}.{self.name}")


class Opaque:
    """Something that holds no tensors and that nobody looks into."""


def checked_key(key):
    """A key as it is, where it is one that a dictionary of tensors has: others may be made to collide for ever."""
    if not isinstance(key, (str, int, bytes)) or (isinstance(key, int) and abs(key) >> 63):
        raise Refused("a dictionary with objects for keys")
    return key


def _is_size(value) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _sizes(values) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > _MOST_AXES or not all(map(_is_size, values)):
        raise Damaged("a tensor whose shape or strides are none")
    return values


def _place(storage, offset, shape, stride, dtype, flags):
    if isinstance(storage, Unreadable):
        return storage
    shape, stride = _sizes(shape), _sizes(stride)
    if not isinstance(storage, Storage) or not _is_size(offset) or len(shape) != len(stride):
        raise Damaged("a tensor that is not described as torch does")
    flags = flags if isinstance(flags, dict) else {}
    negative = flags.get("neg") is True
    if negative and dtype not in _NEGATED:
        raise Damaged("a negated tensor of a type that has no sign")
    return Place(storage, dtype, offset, shape, stride, negative)


def _tensor(storage, offset, shape, stride, requires_grad=False, hooks=None, flags=None):
    return _place(storage, offset, shape, stride, getattr(storage, "dtype", None), flags)


def _tensor_of_bytes(storage, offset, shape, stride, requires_grad, hooks, dtype, flags=None):
    if isinstance(storage, Storage) and storage.dtype is not None:
        raise Damaged("a tensor of one type in a storage of another")
    return _place(storage, offset, shape, stride, _DTYPES.get(str(dtype)) if isinstance(dtype, Global) else None, flags)


def _ordered(*pairs):
    made = {}
    for pair in pairs[0] if pairs and isinstance(pairs[0], (list, tuple)) else ():
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Damaged("an ordered dictionary of something else than pairs")
        made[checked_key(pair[0])] = pair[1]
    return made


def _encoded(text, encoding="utf-8", *_):
    """What protocol 2 makes of bytes: a text and "latin1"."""
    if not isinstance(text, str) or not isinstance(encoding, str) or encoding not in ("latin1", "latin-1", "utf-8"):
        raise Refused("_codecs.encode to " + (shown(encoding) if isinstance(encoding, str) else "something"))
    return text.encode(encoding, "surrogatepass" if encoding == "utf-8" else "strict")


def _nothing(*_):
    return Opaque()


def _of_type(function, kind, arguments, *_):
    """A parameter with attributes: the tensor in it."""
    make = CALLS.get(function) if isinstance(function, Global) else None
    if make not in (_tensor, _tensor_of_bytes) or not isinstance(arguments, tuple):
        raise Refused(f"an object made by {function}" if isinstance(function, Global) else "an object of another type")
    return make(*arguments)


CALLS = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_bytes,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
    ("torch._utils", "_rebuild_qtensor"): lambda *_: Unreadable("quantized"),
    ("torch._utils", "_rebuild_sparse_tensor"): lambda *_: Unreadable("sparse"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): lambda *_: Unreadable("without data"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): lambda *_: Unreadable("of another device"),
    ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
    ("torch", "Size"): lambda shape=(): _sizes(tuple(shape)),
    ("torch", "device"): _nothing,
    ("torch.serialization", "_get_layout"): _nothing,
    ("collections", "OrderedDict"): _ordered,
    ("collections", "Counter"): _nothing,
    ("builtins", "set"): _nothing,
    ("builtins", "frozenset"): _nothing,
    ("builtins", "bytearray"): _nothing,
    ("builtins", "complex"): _nothing,
    ("_codecs", "encode"): _encoded,
}


def is_known(found: Global) -> bool:
    if (found.module.replace("__builtin__", "builtins"), found.name) in CALLS:
        return True
    if found.module == "torch":
        return found.name in (*_STORAGES, *_QUANTIZED) or str(found) in _INERT
    return found in (("torch.storage", "UntypedStorage"), ("torch.nn.parameter", "Parameter"))


def storage_of(described) -> Storage | Unreadable:
    """The storage that a persistent name of torch's describes."""
    kind, *given = described if isinstance(described, tuple) and described else (None,)
    if kind != "storage" or len(given) not in (4, 5):
        raise Refused("an object by a persistent name")
    storage, key, _, count, *view = given
    if not isinstance(storage, Global) or not isinstance(key, str) or not _is_size(count) or any(view):
        raise Damaged("a storage that is not described as torch does")
    if storage.name in _QUANTIZED:
        return Unreadable(storage.name)
    dtype = _STORAGES.get(storage.name)
    if dtype is None and storage.name != "UntypedStorage":
        raise Refused(str(storage))
    return Storage(key, dtype, count)
