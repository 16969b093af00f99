"""The processes that torchrun started to make one clip: what they must have in common, who speaks, what failed."""

import datetime
import json
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from ..errors import TurboError
from .sequence import Sequence
from .watch import Ended, Watch, ending

_HOW = "torchrun --nproc-per-node N -m turbo_core generate ... --parallel sequence"


class Alone:
    """One process that makes a clip by itself, with the interface of a Team."""

    first, size, sequence = True, 1, None

    def agree(self, facts) -> None:
        pass

    def check(self, num_heads: int, length: int) -> None:
        pass

    def told(self, make):
        return make()

    def from_first(self, make):
        return make()


class Team:
    """The processes of one clip, one device each. The first one reads the text, writes and prints.

    A context manager: when one process fails, one line says which and why, and all of them end with exit code 2.
    """

    def __init__(self, device=None):
        """device: "cuda", "cpu", or None for the best there is. Raises TurboError where torchrun did not start this."""
        if not started_by_torchrun():
            raise TurboError(f"--parallel needs several processes: start it with {_HOW}.")
        self.device = _own_device(device)
        cuda = self.device.type == "cuda"
        # long: the others wait while the first reads the text encoder; who is gone is found by its silence
        patience = datetime.timedelta(hours=6)
        store, self.rank, self.size = next(dist.rendezvous("env://", timeout=datetime.timedelta(minutes=10)))
        self._store = dist.PrefixStore("turbo_core", store)
        if cuda:
            torch.cuda.set_device(self.device)
        group = {"store": dist.PrefixStore("group", store), "rank": self.rank, "world_size": self.size}
        dist.init_process_group("nccl" if cuda else "gloo", timeout=patience, **group)
        self.sequence = Sequence()
        self.first = self.rank == 0
        self._watch = self._ending = None
        self._asked = 0

    def __enter__(self):
        self._watch = Watch(self._store, self.rank, self.size)
        self._ending = ending()
        self._ending.__enter__()
        return self

    def __exit__(self, kind, error, traceback):
        try:
            if error is not None:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's patience is longer than what is said takes
                self._fail(error)
        finally:
            self._ending.__exit__(None, None, None)
            self._watch.leave(done=error is None)
            if error is None:
                dist.destroy_process_group()

    def check(self, num_heads: int, length: int) -> None:
        """Raise TurboError unless heads and tokens divide among the processes, see Sequence.check."""
        self.sequence.check(num_heads, length)

    def agree(self, facts) -> None:
        """Raise TurboError, which names process and fact, unless facts(), {name: value}, is the same in all of them."""
        self._asked += 1
        own = {name: str(value) for name, value in facts().items()}
        self._store.set(f"facts/{self._asked}/{self.rank}", json.dumps(own))
        first = self._awaited(f"facts/{self._asked}/0")
        for rank in range(1, self.size):
            other = self._awaited(f"facts/{self._asked}/{rank}")
            for name, value in first.items():
                if other.get(name) != value:
                    raise TurboError(
                        f"The processes differ in {name}: {self._watch.name(rank)} has {other.get(name)}, the first "
                        f"one {value}. Give all of them the same program, files and settings."
                    )

    def told(self, make):
        """make() of the first process, which fits into JSON, in all of them."""
        self._asked += 1
        place = f"told/{self._asked}"
        if self.first:
            self._store.set(place, json.dumps(make()))
        return self._awaited(place)

    def from_first(self, make):
        """make() of the first process, a tensor, in all of them, on their devices."""
        tensor = make().to(self.device).contiguous() if self.first else None
        shape, dtype = self.told(lambda: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")])
        if not self.first:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
        dist.broadcast(tensor.view(-1).view(torch.uint8), 0)
        return tensor

    def _awaited(self, key):
        """What another process writes to the store, which may be minutes from now; raises Ended when one failed."""
        while not self._store.check([key]):
            if self._watch.has_failed():
                raise Ended
            time.sleep(0.02)
        return json.loads(self._store.get(key))

    def _fail(self, error):
        """Say what ended the clip in one process; raises SystemExit in the others."""
        if isinstance(error, Ended) or (isinstance(error, RuntimeError) and _is_of_a_connection(error)):
            gone = [] if self._watch.has_failed() else self._watch.gone()
            if gone and self._watch.is_first_to_tell():
                names = ", ".join(map(self._watch.name, gone))
                raise TurboError(
                    f"{names} ended without a word: killed, or out of memory? The clip is not made."
                ) from error
            sys.exit(2)
        if not self.first:
            time.sleep(1)  # what fails everywhere is told by the first
        if not self._watch.is_first_to_tell():
            sys.exit(2)
        if not self.first and isinstance(error, TurboError):
            raise TurboError(f"{self._watch.name(self.rank)}: {error}") from error


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def _own_device(device) -> torch.device:
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cuda", "cpu") or device.index is not None:
        raise TurboError(f"--parallel gives each process a device of its own: say cuda or cpu, got {device}.")
    if device.type == "cpu":
        return device
    place, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if place >= cards:
        raise TurboError(f"This machine has {cards} GPUs, process {place} of it has none: --nproc-per-node {cards}.")
    return torch.device("cuda", place)


def _is_of_a_connection(error) -> bool:
    """True for what gloo and NCCL raise when another process is gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")
    )
