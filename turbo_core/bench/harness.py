"""Times of contenders that take turns on one device, each held to an oracle before it is timed.

A contender that is wrong is reported as wrong and not timed; one that is not installed or cannot run is named with the
reason. On a card device events are recorded around each run, elsewhere the wall clock is read.
"""

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import TurboError
from ..selfcheck import answers

REPEATS, SECONDS, FEWEST = 50, 2.0, 3  # of each contender: that many runs, or that long, but never fewer runs
WARM_UP, LONG = 2, 2.0  # runs after the first, which may compile; one of that many seconds warms up enough
FEWEST_LONG = 2  # of a contender that takes LONG: forth and back
FLUSHED = 1 << 28  # bytes written before each run of a streaming case: more than any card's or CPU's last cache


class Missing(Exception):
    """Why a contender cannot take part on this machine, in a few words."""


@dataclass(frozen=True)
class Contender:
    """build() -> function of nothing to time; it raises Missing where the contender is not there.

    error: what the function returns -> relative error against the oracle; None for a part of a contender that is
    judged as a whole. bound: the largest error that counts as right; None where the contender computes something else
    by design, whose distance is told and not judged. alone: a kernel by itself, its operands prepared beforehand.
    flop: what it computes, where that is less than the case's.
    """

    name: str
    build: Callable[[], Callable[[], Any]]
    error: Callable[[Any], float] | None
    bound: float | None
    alone: bool = False
    flop: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One table: contenders for the same job. flop and bytes: what the job needs at least, however it is done.

    streaming: bound by memory, so the caches are flushed before each run. baselines: the others are compared with the
    first of these that has a time.
    """

    name: str
    shape: dict[str, int]
    contenders: list[Contender]
    baselines: tuple[str, ...]
    flop: float = 0.0
    bytes: float = 0.0
    streaming: bool = False
    notes: list[str] = field(default_factory=list)


def exact(t):
    """In float64, on the CPU where the device has none."""
    return t.to("cpu" if t.device.type == "mps" else t.device, torch.float64)


def relative_error(got, want) -> float:
    """Norm of got - want over the norm of want; inf where got holds anything that is not finite."""
    got, want = exact(got), exact(want)
    if got.shape != want.shape or not bool(got.isfinite().all()):
        return float("inf")
    return ((got - want).norm() / want.norm().clamp_min(1e-30)).item()


class WallClock:
    """Seconds by the wall clock, for CPUs and cards without events."""

    name = "wall clock"
    read = staticmethod(time.perf_counter)

    def __init__(self, device):
        self.device = torch.device(device)
        self.dirt = torch.empty(0, dtype=torch.int8)

    def synchronize(self):
        if self.device.type == "mps":
            torch.mps.synchronize()

    def release(self):
        """Give back the memory that the last case used and nobody holds."""

    def answers(self) -> bool:
        """False once a kernel has read or written where it must not, after which a card refuses everything."""
        return True

    def flush(self):
        """Write more than the caches hold, so that no operand of the next run lies in them."""
        if not self.dirt.numel():
            self.dirt = torch.empty(FLUSHED, dtype=torch.int8, device=self.device)
        self.dirt.zero_()

    def round(self, functions, flush: bool) -> list[float]:
        """Run each once, one after another; seconds of each."""
        seconds = []
        for function in functions:
            if flush:
                self.flush()
            self.synchronize()
            start = self.read()
            function()
            self.synchronize()
            seconds.append(self.read() - start)
        return seconds


class ThreadClock(WallClock):
    """Seconds that this thread has computed: what other processes take of a busy CPU is not in them."""

    name = "CPU time of one thread"
    read = staticmethod(time.thread_time)


class EventClock(WallClock):
    """Seconds between device events. The round is queued as a whole: launches hide behind the work before them."""

    name = "device events"

    def synchronize(self):
        torch.cuda.synchronize(self.device)

    def release(self):
        torch.cuda.empty_cache()

    def answers(self):
        return answers(self.device)

    def round(self, functions, flush):
        marks = []
        for function in functions:
            if flush:
                self.flush()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            marks.append((begin, end))
        self.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in marks]


def clock_of(device) -> WallClock:
    """The clock for a device."""
    device = torch.device(device)
    if device.type == "cuda":
        return EventClock(device)
    # the clock of a thread ticks too slowly on Windows, and says nothing of what other threads do
    alone = device.type == "cpu" and torch.get_num_threads() == 1 and sys.platform != "win32"
    return (ThreadClock if alone else WallClock)(device)


def in_short(error: Exception) -> str:
    """Its kind and the first line of its message."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:200]}"


def admit(contender: Contender, clock) -> tuple[dict, Callable | None]:
    """Build a contender, run it once and compare: (its row of the table, the function to time or None)."""
    row = {"name": contender.name, "alone": contender.alone, "bound": contender.bound, "note": contender.note}
    try:
        function = contender.build()
        start = time.perf_counter()
        result = function()
        clock.synchronize()
        row["first_s"] = round(time.perf_counter() - start, 4)
        error = None if contender.error is None else contender.error(result)
        del result
        row["error"] = float(f"{error:.3g}") if error is not None and math.isfinite(error) else None
        if contender.bound is not None and not error <= contender.bound:
            said = "not finite" if row["error"] is None else f"{error:.2e}"
            return row | {"status": "wrong", "reason": f"relative error {said}, more than {contender.bound:.0e}"}, None
        # on a CPU, where no clock rises and no tuner tries launches, a first run that long is enough
        warm = clock.device.type == "cpu" and row["first_s"] > LONG
        for _ in range(0 if warm else WARM_UP):
            start = time.perf_counter()
            function()
            clock.synchronize()
            if time.perf_counter() - start > LONG:
                break
    except Missing as reason:
        return row | {"status": "missing", "reason": str(reason)}, None
    except Exception as error:  # a compiler's, a driver's or a foreign library's: the others go on
        if not clock.answers():
            raise TurboError(
                f"{contender.name} broke the connection to {clock.device} ({in_short(error)}): nothing runs there "
                "until a restart. What was measured before is in a .partial.json file; other groups can be run apart."
            ) from error
        return row | {"status": "failed", "reason": in_short(error)}, None
    return row | {"status": "ok"}, function


def interleave(functions: list, clock, flush=False, repeats=REPEATS, seconds=SECONDS, tick=None) -> list[list[float]]:
    """Seconds of every run of each function. They take turns, forth and back (A B B A), each round beginning with
    another one.

    A function is done after `repeats` runs or `seconds`, whichever comes first, but never before FEWEST runs, or
    FEWEST_LONG where one takes more than LONG seconds. tick: called with (rounds done, repeats) after each round.
    """
    times = [[] for _ in functions]
    running = list(range(len(functions)))
    rounds = 0

    def goes_on(taken):
        few = min(FEWEST_LONG if taken[0] > LONG else FEWEST, repeats)
        return len(taken) < repeats and (len(taken) < few or sum(taken) < seconds)

    while running:
        turn = rounds // 2 % len(running)
        order = (running[turn:] + running[:turn])[:: -1 if rounds % 2 else 1]
        for i, elapsed in zip(order, clock.round([functions[i] for i in order], flush)):
            times[i].append(elapsed)
        running = [i for i in running if goes_on(times[i])]
        rounds += 1
        if tick:
            tick(min(rounds, repeats), repeats)
    return times


def summary(seconds: list[float]) -> dict:
    """Median, p10, p90 and least of some times, in milliseconds."""
    if len(seconds) > 1:
        tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    else:
        tenths = seconds * 9
    picked = {"ms": statistics.median(seconds), "p10": tenths[0], "p90": tenths[8], "min": min(seconds)}
    return {name: float(f"{1e3 * value:.4g}") for name, value in picked.items()} | {"repeats": len(seconds)}


def rates(flop: float, bytes: float, milliseconds: float, limits: dict) -> dict:
    """Rates of work that took so long, and their fractions of the machine's own, as far as both are known."""
    found = {}
    for amount, unit, scale, name in ((flop, "tflops", 1e9, "matmul"), (bytes, "gb_s", 1e6, "copy")):
        if amount:
            found[unit] = float(f"{amount / milliseconds / scale:.4g}")
            if limits.get(unit):
                found[f"of_{name}"] = round(found[unit] / limits[unit], 4)
    return found


def measure(case: Case, clock, limits: dict, repeats=REPEATS, seconds=SECONDS, tick=None, watch=None, seen=None):
    """Admit every contender, time those that are right, compare them: the case as a dict for JSON.

    limits: {"tflops", "gb_s"} of the machine. watch: context manager whose value, a list, takes what the card says of
    its clocks meanwhile. seen: called with the row of each contender after its first run.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # else the shapes of earlier cases make the compiled contenders dynamic ones
    admitted = []
    for contender in case.contenders:
        admitted.append(admit(contender, clock))
        if seen:
            seen(admitted[-1][0])
    ready = [i for i, (_, function) in enumerate(admitted) if function]
    with watch or contextlib.nullcontext({}) as clocks:
        functions = [admitted[i][1] for i in ready]
        times = interleave(functions, clock, case.streaming, repeats, seconds, tick)
    rows = [row for row, _ in admitted]
    for i, elapsed in zip(ready, times):
        rows[i] |= summary(elapsed)
        own = case.contenders[i].flop
        rows[i] |= rates(case.flop if own is None else own, case.bytes, rows[i]["ms"], limits)
    timed = {row["name"]: row["ms"] for row in rows if "ms" in row}
    base = next((name for name in case.baselines if name in timed), None)
    for row in rows:
        if base and "ms" in row:
            row["speedup"] = float(f"{timed[base] / row['ms']:.3g}")
    return {
        "name": case.name,
        "shape": case.shape,
        "flop": case.flop,
        "bytes": case.bytes,
        "streaming": case.streaming,
        "baseline": base,
        "notes": case.notes,
        "clocks": dict(clocks),
        "rows": rows,
    }
