"""Files read from the disk and not from where they are mapped: a mapped file that is cut short ends the process."""

import functools
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from .devices import available_memory
from .errors import TurboError
from .files import human_bytes

_BLOCK = 1 << 12  # bytes kept of the last place: a directory and a pickle are read by the byte
_SHARE = 0.8  # of the memory that is free, what files may be read into


class Shorter(OSError):
    """A file has become shorter since it was opened."""


class Source:
    """An open file by slices, like the bytes it holds. Raises Shorter where it has become so."""

    def __init__(self, path):
        self.path = Path(path)
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._file = open(self.fd, "rb", buffering=0, closefd=False)  # noqa: SIM115 (closed with this object)
        self._size, self._turn = os.fstat(self.fd).st_size, threading.Lock()
        self._block, self._begins = b"", 0

    def __del__(self):
        if hasattr(self, "fd"):
            os.close(self.fd)

    def __len__(self):
        return self._size

    def check(self) -> None:
        """Raise TurboError where the file has become shorter."""
        if os.fstat(self.fd).st_size < self._size:
            raise self.shorter()

    def shorter(self) -> TurboError:
        """The error of a file that has become shorter."""
        return TurboError(
            f"{self.path} changed while it was read: it was cut short. Nothing was written: try again when it stays "
            "as it is."
        )

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._size)
        stop = max(start, stop)
        if stop - start > _BLOCK:
            data = bytearray(stop - start)
            self.fill(data, start)
            return bytes(data)
        with self._turn:
            block, begins = self._block, self._begins
        if not begins <= start <= stop <= begins + len(block):
            begins = start // _BLOCK * _BLOCK
            block = bytearray(min(2 * _BLOCK, self._size - begins))
            self.fill(block, begins)
            with self._turn:
                self._block, self._begins = bytes(block), begins
        return bytes(block[start - begins : stop - begins])

    def find(self, part: bytes, start: int, end: int) -> int:
        for at in range(start, end, _BLOCK):
            found = self[at : min(end, at + _BLOCK + len(part) - 1)].find(part)
            if found >= 0:
                return at + found
        return -1

    def rfind(self, part: bytes, start: int) -> int:
        found = self[start : self._size].rfind(part)
        return found if found < 0 else start + found

    def fill(self, buffer, start: int) -> None:
        """Fill a buffer with what begins at a byte."""
        left = memoryview(buffer)
        with self._turn:
            self._file.seek(start)
            while left:
                count = self._file.readinto(left)
                if not count:
                    raise Shorter("it was cut short while it was read")
                left = left[count:]


class Disk:
    """The files in whose mappings tensors lie, held open as they were then."""

    def __init__(self):
        self._places = []  # (address of the first byte, of the byte past the last, source)
        self._room = torch.empty(0, dtype=torch.uint8)

    def add(self, source: Source, address: int) -> None:
        self._places.append((address, address + len(source), source))

    def __or__(self, other: "Disk") -> "Disk":
        both = Disk()
        both._places = [*self._places, *other._places]
        return both

    def source_of(self, tensor: torch.Tensor) -> tuple[Source, int] | None:
        """(the file in whose mapping a tensor lies, the byte where it begins), None for one in memory."""
        if tensor.device.type != "cpu" or tensor.numel() == 0:
            return None
        address = tensor.data_ptr()
        return next(((source, address - a) for a, end, source in self._places if a <= address < end), None)

    def check(self) -> None:
        """Raise TurboError where one of the files has become shorter: what lies there must not be touched."""
        for _, _, source in self._places:
            source.check()

    def stays_mapped(self, tensors, copies: int = 1) -> bool:
        """Whether tensors are to stay where they are mapped: the free memory does not hold so many copies of them.

        Else they are to be read: it takes the memory of a private copy, where mapped pages are the system's to drop,
        and no change of the file can end the process then. Windows lets nobody cut a file that is mapped.
        """
        size, free = sum(tensor.nbytes for tensor in tensors), available_memory()
        if os.name != "nt" and (free is None or copies * size <= _SHARE * free[0]):
            return False
        if os.name != "nt":
            names = ", ".join(dict.fromkeys(str(source.path) for _, _, source in self._places))
            logging.info(
                "TurboWan: %s stays mapped (%s, %s of memory are free): do not change the file meanwhile.",
                names,
                human_bytes(size),
                human_bytes(free[0]),
            )
        return True

    def reader(self, tensors, device) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What brings tensors of a file that go to a device into memory, one at a time; None where they stay mapped."""
        if torch.device(device).type == "meta":
            return None
        if torch.device(device).type != "cpu":
            return functools.partial(self.read, again=True)  # until the copy to the device is made
        return None if self.stays_mapped(tensors) else self.read

    def read(self, tensor: torch.Tensor, again: bool = False) -> torch.Tensor:
        """A copy of a tensor that lies in a mapping, in memory, by reading the file; any other one as it is.

        again: in memory that the next such call takes again, which needs no new pages. Raises TurboError where the file
        has become shorter.
        """
        found = self.source_of(tensor)
        if found is None:
            return tensor
        source, start = found
        count = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride()))
        numbers = self._again(count, tensor.dtype) if again else torch.empty(count, dtype=tensor.dtype)
        try:
            source.fill(numbers.view(torch.uint8).numpy(), start)
        except Shorter as error:
            raise source.shorter() from error
        except OSError as error:
            raise TurboError(f"{source.path} could not be read ({error.strerror or error}). Check its disk.") from error
        return numbers.as_strided(tensor.shape, tensor.stride())

    def _again(self, count, dtype):
        size = count * dtype.itemsize
        if len(self._room) < size:
            self._room = torch.empty(size, dtype=torch.uint8)
        return self._room[:size].view(dtype)
