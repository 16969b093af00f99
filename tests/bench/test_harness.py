"""How the benchmark measures: its statistics, the taking of turns, who takes part and who is named instead."""

import json
import sys

import pytest
import torch

from turbo_core.bench import harness
from turbo_core.bench.harness import Case, Contender, Missing
from turbo_core.errors import TurboError


class Script(harness.WallClock):
    """A clock that lets functions say how long they took, and keeps who ran when."""

    def __init__(self):
        super().__init__("cpu")
        self.order, self.flushed = [], 0

    def round(self, functions, flush):
        self.flushed += flush * len(functions)
        self.order.append([function.name for function in functions])
        return [function() for function in functions]


def lasting(name, seconds):
    """A function that takes these seconds, in turn and again."""
    state = {"i": -1}

    def run():
        state["i"] += 1
        return seconds[state["i"] % len(seconds)]

    run.name = name
    return run


def contender(name, seconds=1e-3, error=0.0, bound=1e-2, **more):
    return Contender(name, lambda: lasting(name, [seconds]), lambda result: error, bound, **more)


def missing():
    raise Missing("it is not installed")


def broken():
    raise RuntimeError("no kernel image\nfor this device")


def test_summary_is_the_median_with_its_tenths():
    told = harness.summary([i / 1e3 for i in range(1, 12)])  # 1 to 11 ms
    assert told == {"ms": 6.0, "p10": 2.0, "p90": 10.0, "min": 1.0, "repeats": 11}
    assert harness.summary([0.005])["p90"] == 5.0


def test_contenders_take_turns_forth_and_back_and_each_round_begins_with_another():
    clock = Script()
    times = harness.interleave([lasting(n, [1e-3]) for n in "abc"], clock, repeats=4, seconds=10)
    assert clock.order == [["a", "b", "c"], ["c", "b", "a"], ["b", "c", "a"], ["a", "c", "b"]]
    assert [len(t) for t in times] == [4, 4, 4] and clock.flushed == 0


def test_two_that_take_minutes_run_forth_and_back_once():
    clock = Script()
    harness.interleave([lasting(n, [60.0]) for n in "ab"], clock)
    assert clock.order == [["a", "b"], ["b", "a"]]


def test_who_takes_part_is_told_before_the_rounds():
    clock, told = Script(), []
    everyone = [contender("base"), Contender("absent", missing, lambda result: 0.0, 1.0)]
    harness.measure(
        Case("case", {}, everyone, ("base",)),
        clock,
        {},
        1,
        seen=lambda row: told.append(row | {"at": len(clock.order)}),
    )
    assert [(row["name"], row["status"], row["at"]) for row in told] == [("base", "ok", 0), ("absent", "missing", 0)]


def test_a_slow_contender_leaves_early_but_not_before_its_fewest_runs():
    clock = Script()
    functions = [lasting("slow", [1.5]), lasting("long", [0.5]), lasting("fast", [0.001])]
    times = harness.interleave(functions, clock, flush=True, repeats=50, seconds=2.0)
    assert [len(t) for t in times] == [harness.FEWEST, 4, 50]
    assert clock.flushed == sum(len(t) for t in times)


def test_the_wall_clock_tells_what_passed():
    def sleep():
        end = harness.time.perf_counter() + 0.01
        while harness.time.perf_counter() < end:
            pass

    first, second = harness.WallClock("cpu").round([sleep, lambda: None], flush=False)
    assert 0.01 <= first < 1 and second < first


def test_the_event_clock_records_around_each_run_after_the_flush(monkeypatch):
    now, happened = [0.0], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = now[0]
            happened.append("record")

        def elapsed_time(self, end):
            return end.at - self.at

    def lasting(milliseconds):
        def run():
            now[0] += milliseconds
            happened.append("run")

        return run

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: happened.append("synchronize"))
    clock = harness.EventClock("cuda")
    monkeypatch.setattr(clock, "flush", lambda: (lasting(100)(), happened.append("flush")))
    assert clock.round([lasting(2), lasting(3)], flush=True) == [2e-3, 3e-3]
    one = ["run", "flush", "record", "run", "record"]
    assert happened == [*one, *one, "synchronize"]
    assert type(harness.clock_of("cuda")) is harness.EventClock


def test_one_thread_of_a_cpu_is_timed_by_what_it_computes(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert type(harness.clock_of("cpu")) is harness.WallClock
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(sys, "platform", "linux")
    clock = harness.clock_of("cpu")
    assert type(clock) is harness.ThreadClock
    (waited,) = clock.round([lambda: harness.time.sleep(0.05)], flush=False)
    assert waited < 0.02
    monkeypatch.setattr(sys, "platform", "win32")
    assert type(harness.clock_of("cpu")) is harness.WallClock


def test_rates_are_fractions_of_the_machine_s_own():
    found = harness.rates(2e9, 1e7, 1.0, {"tflops": 4.0, "gb_s": 20.0})
    assert found == {"tflops": 2.0, "of_matmul": 0.5, "gb_s": 10.0, "of_copy": 0.5}
    assert harness.rates(2e9, 0, 1.0, {}) == {"tflops": 2.0}


def test_the_missing_the_broken_and_the_wrong_are_named_and_not_timed():
    ran = []
    wrong = Contender("wrong", lambda: lambda: ran.append(1) or 0.0, lambda result: 0.5, 0.01)
    everyone = [
        contender("base", 4e-3),
        contender("twice as fast", 2e-3, error=5e-3),
        contender("another function", 1e-3, error=0.7, bound=None),
        Contender("absent", missing, lambda result: 0.0, 1.0),
        Contender("broken", broken, lambda result: 0.0, 1.0),
        Contender("broken later", lambda: broken, lambda result: 0.0, 1.0),
        wrong,
        contender("not a number", error=float("nan")),
    ]
    told = harness.measure(Case("case", {"m": 1}, everyone, ("gone", "base"), flop=8e9), Script(), {"tflops": 4.0}, 5)
    rows = {row["name"]: row for row in told["rows"]}
    assert list(rows) == [c.name for c in everyone]
    assert told["baseline"] == "base" and rows["base"]["speedup"] == 1.0
    assert rows["twice as fast"]["speedup"] == 2.0 and rows["twice as fast"]["of_matmul"] == 1.0
    assert rows["twice as fast"]["error"] == 5e-3 and rows["another function"]["status"] == "ok"
    assert (rows["absent"]["status"], rows["absent"]["reason"]) == ("missing", "it is not installed")
    assert rows["broken"]["status"] == rows["broken later"]["status"] == "failed"
    assert rows["broken"]["reason"] == "RuntimeError: no kernel image"
    assert rows["wrong"]["status"] == "wrong" and "5.00e-01" in rows["wrong"]["reason"] and len(ran) == 1
    assert rows["not a number"]["status"] == "wrong" and "not finite" in rows["not a number"]["reason"]
    assert not any("ms" in rows[name] for name in ("absent", "broken", "broken later", "wrong", "not a number"))
    json.dumps(told, allow_nan=False)


def test_a_contender_that_breaks_the_card_ends_the_run_with_its_name():
    clock = Script()
    clock.answers = lambda: False
    with pytest.raises(TurboError, match=r"broken broke the connection to cpu.*no kernel image.*partial"):
        harness.admit(Contender("broken", lambda: broken, lambda result: 0.0, 1.0), clock)


def test_the_error_measure_refuses_what_is_not_finite_or_of_another_shape():
    want = torch.tensor([3.0, 4.0])
    assert harness.relative_error(torch.tensor([3.0, 4.5]), want) == pytest.approx(0.1)
    assert harness.relative_error(torch.tensor([3.0, float("nan")]), want) == float("inf")
    assert harness.relative_error(torch.tensor([3.0]), want) == float("inf")


@pytest.mark.parametrize(
    ("long", "device", "runs"), [(1e9, "cpu", 1 + harness.WARM_UP), (-1.0, "cpu", 1), (-1.0, "mps", 2)]
)
def test_what_runs_long_is_warmed_up_once(long, device, runs, monkeypatch):
    monkeypatch.setattr(harness, "LONG", long)
    ran, clock = [], Script()
    clock.device, clock.synchronize = torch.device(device), lambda: None
    row, _ = harness.admit(Contender("x", lambda: lambda: ran.append(1), lambda result: 0.0, 1e-2), clock)
    assert row["status"] == "ok" and len(ran) == runs
