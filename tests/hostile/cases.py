"""What a hostile input is, and what came of it."""

from collections.abc import Callable, Mapping
from random import Random
from types import MappingProxyType
from typing import NamedTuple

# worst first; the last two are right
OUTCOMES = ("ran", "crash", "hang", "over 1 GB", "traceback", "damaged", "wrong", "unclear", "fine", "clear")
GOOD = ("fine", "clear")


class Case(NamedTuple):
    """An input: what to write and which doors to open with it.

    door: a name in doors.DOORS. files: {name: bytes}, of which the first is the one to open. same: the tensors that
    loading must give if it takes the file. refuse: why it must be refused, where it must. arguments: of the door.
    """

    door: str
    files: Mapping[str, bytes] = MappingProxyType({})
    same: dict | None = None
    refuse: str = ""
    arguments: tuple = ()


class Kind(NamedTuple):
    """A class of inputs: how to make the one of a seed, its share of a run, and which outcomes are right."""

    make: Callable[[Random], Case]
    share: int
    right: str
