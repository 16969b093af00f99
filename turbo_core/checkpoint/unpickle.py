"""Reading the pickle inside a .pth without running it: plain containers, numbers, texts, and where tensors lie.

A machine of its own for the opcodes of such a pickle, with a short list of names that it knows; whatever else a pickle
asks for is refused when it is named, before it could be called. Nothing is imported or called on the word of the file,
and what is made of it stays within a few times the size of the largest pickle allowed.
"""

import re
import struct
from typing import Any, NamedTuple

from .places import CALLS, Damaged, Global, Opaque, Refused, Storage, checked_key, is_known, storage_of

MOST = 1 << 25  # bytes of a pickle: that of a 14B model has 200 kB, with its optimizer's 1 MB
MOST_STEPS = 1 << 22  # opcodes
_OBJECTS = b"io\x82\x83\x84\x92\x97\x98"  # opcodes by which a pickle makes objects, none of which a tensor needs
_MOST_DIGITS = 1 << 6  # of a number


class _Mark:
    pass


class Pickled(NamedTuple):
    """What a pickle holds; tensors are Place or Unreadable."""

    content: Any
    end: int  # of the pickle
    storages: dict[str, Storage]  # all that it names, by their keys


def read(data, start: int = 0) -> Pickled:
    """The pickle at `start` of bytes. Raises Refused and Damaged."""
    machine = _Machine(data, start)
    try:
        return Pickled(machine.run(), machine.at, machine.storages)
    except (IndexError, struct.error, UnicodeError) as error:
        raise Damaged(f"the pickle ends or breaks at byte {machine.at} ({type(error).__name__})") from error


class _Machine:
    def __init__(self, data, start):
        self.data, self.at, self.end = data, start, min(len(data), start + MOST)
        self.stack, self.memo, self.marks, self.storages = [], {}, [], {}
        self.spent = 0  # elements that calls were given: a memoized list may be given many times

    # what the file holds

    def take(self, count: int) -> bytes:
        if self.at + count > self.end:
            raise Damaged(f"the pickle ends within {count} bytes at byte {self.at}")
        part = bytes(self.data[self.at : self.at + count])
        self.at += count
        return part

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.end)
        if end < 0:
            raise Damaged(f"the pickle ends within a line at byte {self.at}")
        text = bytes(self.data[self.at : end]).decode("utf-8")
        self.at = end + 1
        return text

    def text(self, size: int) -> str:
        return self.take(size).decode("utf-8", "surrogatepass")

    # the stack

    def pop(self):
        value = self.stack.pop()
        if value is _Mark:
            raise Damaged(f"the pickle has nothing on its stack at byte {self.at}")
        return value

    def to_mark(self) -> list:
        start = self.marks.pop()
        items = self.stack[start + 1 :]
        del self.stack[start:]
        return items

    def top(self, kind):
        value = self.stack[-1]
        if not isinstance(value, kind):
            raise Damaged(f"the pickle fills something that is no container at byte {self.at}")
        return value

    def run(self):
        for _ in range(MOST_STEPS):
            code = self.take(1)
            if code == b".":
                return self.pop()
            step = _STEPS.get(code)
            if step is None:
                if code == b"P":
                    raise Damaged("it is a pickle of protocol 0 or 1: save it again as torch does by default")
                if code in _OBJECTS:
                    raise Refused(f"an object by the opcode {code.hex()}")
                raise Damaged(f"it is no pickle at byte {self.at - 1}")
            step(self)
        raise Damaged(f"the pickle has more than {MOST_STEPS} steps")

    def push(self, value):
        self.stack.append(value)

    def mark(self):
        self.marks.append(len(self.stack))
        self.stack.append(_Mark)

    def put(self, key: int):
        self.memo[key] = self.stack[-1]

    def get(self, key: int):
        if key not in self.memo:
            raise Damaged(f"the pickle asks for a value that it has not made at byte {self.at}")
        self.push(self.memo[key])

    def set_items(self, items):
        target = self.top(dict)
        if len(items) % 2:
            raise Damaged(f"the pickle has a key without a value at byte {self.at}")
        for key, value in zip(items[::2], items[1::2]):
            target[checked_key(key)] = value

    def append(self, items):
        self.top(list).extend(items)

    def long(self, size):
        if size > _MOST_DIGITS:
            raise Damaged(f"a number of {size} bytes at byte {self.at}")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def global_(self, module, name):
        if not isinstance(module, str) or not isinstance(name, str):
            raise Damaged(f"a name that is no text at byte {self.at}")
        found = Global(module, name)
        if not is_known(found):
            raise Refused(str(found))
        self.push(found)

    def reduce(self):
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise Refused("an object that is made by calling another one")
        make = CALLS.get((function.module.replace("__builtin__", "builtins"), function.name))
        if make is None:
            raise Refused(str(function))
        self.spent += sum(len(value) for value in arguments if isinstance(value, (str, bytes, list, tuple, dict)))
        if self.spent > MOST:
            raise Damaged(f"the pickle makes more of itself than {MOST:,} elements")
        try:
            self.push(make(*arguments))
        except TypeError as error:
            raise Damaged(f"{function} is called with {len(arguments)} arguments at byte {self.at}") from error

    def build(self):
        self.pop()  # attributes, such as the version numbers in an OrderedDict's _metadata
        if not isinstance(self.stack[-1], (dict, Opaque)):
            raise Refused("an object with a state of its own")

    def persistent(self):
        storage = storage_of(self.pop())
        if isinstance(storage, Storage) and self.storages.setdefault(storage.key, storage) != storage:
            raise Damaged(f"one storage with two descriptions at byte {self.at}")
        self.push(storage)


def _new_object(machine):
    made = machine.stack[-2] if len(machine.stack) > 1 else None
    raise Refused(str(made) if isinstance(made, Global) else "an object")


def _stack_global(machine):
    name, module = machine.pop(), machine.pop()
    machine.global_(module, name)


def _quoted(machine):
    text = machine.line()
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"" or "\\" in text:
        raise Damaged("a text that is not quoted as pickles do")
    return text[1:-1]


def _integer(machine):
    text = machine.line().rstrip("L")
    if text in ("00", "01"):
        return text == "01"
    if len(text) > 2 * _MOST_DIGITS or not re.fullmatch(r"-?[0-9]+", text):
        raise Damaged("a number that is none")
    return int(text)


def _float(machine):
    try:
        return float(machine.line()[:64])
    except ValueError as error:
        raise Damaged("a number that is none") from error


def _tuple_of(count):
    def step(machine):
        machine.push(tuple(reversed([machine.pop() for _ in range(count)])))

    return step


_STEPS = {
    b"\x80": lambda m: m.take(1),  # the protocol: all of them are read alike
    b"\x95": lambda m: m.take(8),  # the length of a frame
    b"(": _Machine.mark,
    b"0": lambda m: m.marks.pop() if m.stack.pop() is _Mark else None,
    b"1": lambda m: m.to_mark(),
    b"2": lambda m: m.push(m.stack[-1]),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"I": lambda m: m.push(_integer(m)),
    b"L": lambda m: m.push(_integer(m)),
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": lambda m: m.long(m.number("<B")),
    b"\x8b": lambda m: m.long(m.number("<I")),
    b"F": lambda m: m.push(_float(m)),
    b"G": lambda m: m.push(m.number(">d")),
    b"S": lambda m: m.push(_quoted(m)),
    b"T": lambda m: m.push(m.take(m.number("<I")).decode("latin1")),
    b"U": lambda m: m.push(m.take(m.number("<B")).decode("latin1")),
    b"V": lambda m: m.push(m.line()),
    b"X": lambda m: m.push(m.text(m.number("<I"))),
    b"\x8c": lambda m: m.push(m.text(m.number("<B"))),
    b"\x8d": lambda m: m.push(m.text(m.number("<Q"))),
    b"B": lambda m: m.push(m.take(m.number("<I"))),
    b"C": lambda m: m.push(m.take(m.number("<B"))),
    b"\x8e": lambda m: m.push(m.take(m.number("<Q"))),
    b"\x96": lambda m: m.push(m.take(m.number("<Q"))),
    b"]": lambda m: m.push([]),
    b"l": lambda m: m.push(m.to_mark()),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.to_mark()),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.to_mark())),
    b"\x85": _tuple_of(1),
    b"\x86": _tuple_of(2),
    b"\x87": _tuple_of(3),
    b"}": lambda m: m.push({}),
    b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    b"u": lambda m: m.set_items(m.to_mark()),
    b"p": lambda m: m.put(_integer(m)),
    b"q": lambda m: m.put(m.number("<B")),
    b"r": lambda m: m.put(m.number("<I")),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"g": lambda m: m.get(_integer(m)),
    b"h": lambda m: m.get(m.number("<B")),
    b"j": lambda m: m.get(m.number("<I")),
    b"c": lambda m: m.global_(m.line(), m.line()),
    b"\x93": _stack_global,
    b"R": _Machine.reduce,
    b"\x81": _new_object,
    b"b": _Machine.build,
    b"Q": _Machine.persistent,
}
