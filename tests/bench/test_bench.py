"""The benchmark: its statistics, the taking of turns, what is named and refused, what stays when it is interrupted."""

import json
import sys

import pytest
import torch

from tests.triton_cpu.process import run_python
from turbo_core import int8
from turbo_core.bench import attention, block, check, harness, linear, machine, report, run, streaming
from turbo_core.bench.harness import Case, Contender, Missing
from turbo_core.cli import main
from turbo_core.cli.bench import BENCHMARKS
from turbo_core.diagnostics import charts
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


# ---- times


def test_summary_is_the_median_with_its_tenths():
    told = harness.summary([i / 1e3 for i in range(1, 12)])  # 1 to 11 ms
    assert told == {"ms": 6.0, "p10": 2.0, "p90": 10.0, "min": 1.0, "repeats": 11}
    assert harness.summary([0.005])["p90"] == 5.0


def test_contenders_take_turns_and_each_round_begins_with_another():
    clock = Script()
    times = harness.interleave([lasting(n, [1e-3]) for n in "abc"], clock, repeats=4, seconds=10)
    assert clock.order == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    assert [len(t) for t in times] == [4, 4, 4] and clock.flushed == 0


def test_a_slow_contender_leaves_early_but_not_before_its_fewest_runs():
    clock = Script()
    functions = [lasting("slow", [5.0]), lasting("long", [0.5]), lasting("fast", [0.001])]
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


# ---- who takes part


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


def test_compiled_contenders_are_named_where_quick_leaves_them_out():
    with pytest.raises(Missing, match="--quick"):
        linear.compiled(lambda: 0, quick=True)


@pytest.mark.parametrize(
    ("make", "cases"),
    [
        (linear.cases, 4),  # the linear and its three fused forms
        (streaming.cases, 5),
        (attention.cases, 2),
        (block.cases, 1),
    ],
)
def test_every_contender_of_ours_is_right_at_the_quick_shapes(make, cases):
    with torch.no_grad():
        made = [case() for case in make("cpu", quick=True)]
        assert len(made) == cases
        for case in made:
            rows = [harness.admit(c, harness.clock_of("cpu"))[0] for c in case.contenders]
            assert any(row["status"] == "ok" and "turbo-core" in row["name"] for row in rows), case.name
            for row in rows:
                assert row["status"] in ("ok", "missing") or "turbo-core" not in row["name"], row
                assert row["status"] != "wrong", row


@pytest.mark.parametrize("name", ["comfy_kitchen", "torchao.quantization", "sageattention"])
def test_a_library_that_is_not_installed_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    names = {"comfy_kitchen": "comfy_kitchen.int8_linear", "torchao.quantization": "torchao"}
    if name == "sageattention":
        case = attention.attention_case("cpu", 1, 1, 130, 64, quick=True)
    else:
        case = linear.linear_case("cpu", 5, 128, 128, quick=True)
    (one,) = [c for c in case.contenders if names.get(name, name) in c.name]
    row, function = harness.admit(one, harness.clock_of("cpu"))
    assert function is None and row["status"] == "missing"
    assert row["reason"] == f"{name.partition('.')[0]} is not installed"


def test_the_oracle_of_attention_sees_a_wrong_block_and_a_lost_linear_branch():
    case = attention.attention_case("cpu", 1, 2, 700, 64, quick=True)
    named = {c.name: c for c in case.contenders}
    sparse, whole = named["sparse 10%, turbo-core float32"], named["SLA 10%, turbo-core float32"]
    assert whole.error(whole.build()()) < 1e-3 < 0.1 < whole.error(sparse.build()())
    dense = named["dense, SDPA"]
    assert dense.error(dense.build()()) < 1e-3 < 0.02 < dense.error(sparse.build()())
    y = dense.build()()
    y[0, 690, 1] = torch.nan  # outside every sample
    assert dense.error(y.roll(-130, 1)) == float("inf")


def test_the_oracle_of_linears_sees_a_missing_bias_and_a_bad_row():
    case = linear.linear_case("cpu", 400, 128, 128, quick=True)
    one = next(c for c in case.contenders if c.name == "row, turbo-core")
    y = one.build()()
    assert one.error(y) < one.bound < one.error(y + 1)
    y[200] = torch.inf  # between the sampled ends
    assert one.error(y) == float("inf")


# ---- the machine


def test_the_machine_s_rates_come_from_its_case():
    rows = [{"name": "copy", "ms": 2.0}, {"name": "bf16 matrix product", "ms": 1.0}, {"name": "int8 matrix product"}]
    told = {"shape": {"bytes": 4_000_000, "n": 100}, "rows": rows}
    assert machine.limits(told) == {"gb_s": 2.0, "tflops": 0.002}


def test_clocks_are_read_from_what_nvidia_smi_says():
    lines = ["1980, 2619, 512.5, 61\n", "1755, 2619, [N/A], 64\n", "cut off, 26"]
    assert machine.read_clocks(lines) == {
        "SM MHz": [1755.0, 1867.5, 1980.0],
        "memory MHz": [2619.0, 2619.0, 2619.0],
        "W": [512.5, 512.5, 512.5],
        "C": [61.0, 62.5, 64.0],
    }
    assert "said nothing" in machine.read_clocks([])["not logged"]


def test_a_busy_machine_is_called_one():
    assert "3.0 processes" in machine.busy({"load": 3, "cores": 2})
    assert machine.busy({"load": 0.2, "cores": 2}) is None
    assert machine.busy({"load": None, "cores": 2}) is None


def test_folders_are_named_after_the_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    assert machine.slug("cuda") == "geforce-rtx-4090" and machine.slug("cpu") == "cpu"


# ---- files


@pytest.fixture
def tiny_group(monkeypatch):
    """One group with two cases that take no time."""

    def case(i):
        return Case(f"case {i}", {"m": i}, [tick("base"), tick("ours, turbo-core")], ("base",), flop=1e6)

    def tick(name):
        return Contender(name, lambda: lambda: torch.zeros(8), lambda result: 0.0, 1e-2)

    class Group:
        @staticmethod
        def cases(device, sizes, quick):
            for i in range(2):
                yield lambda i=i: case(i)

    monkeypatch.setitem(run.GROUPS, "linear", (Group, 3))
    monkeypatch.setattr(machine, "limits_case", lambda device, quick: machine_case())
    return Group


def machine_case():
    contenders = [
        Contender("copy", lambda: lambda: None, lambda result: 0.0, 0.0),
        Contender("float32 matrix product", lambda: lambda: None, lambda result: 0.0, 0.0),
    ]
    return Case("machine", {"bytes": 1000, "n": 10}, contenders, ("copy",))


ROW = {"name", "alone", "bound", "note", "status"}
TIMED = {"first_s", "error", "ms", "p10", "p90", "min", "repeats", "speedup"}


def test_the_files_of_a_run(tiny_group, tmp_path, capsys):
    report = run.run(["linear"], "cpu", tmp_path, quick=True)["linear"]
    folder = tmp_path / "cpu"
    assert sorted(path.name for path in folder.iterdir()) == ["linear.json", "linear.md", "linear.png"]
    told = json.loads((folder / "linear.json").read_text(encoding="utf-8"))
    assert told == json.loads(json.dumps(report))
    assert set(told) == {
        "schema", "group", "machine", "settings", "limits", "limits_after", "notes", "cases"
    }  # fmt: skip
    assert {"device", "name", "system", "date", "versions", "threads", "cores", "load"} <= set(told["machine"])
    assert {"turbo-core", "torch", "python"} <= set(told["machine"]["versions"])
    assert [case["name"] for case in told["cases"]] == ["machine", "case 0", "case 1"]
    for case in told["cases"]:
        for row in case["rows"]:
            assert set(row) >= ROW | TIMED and row["status"] == "ok"
    assert {"tflops", "of_matmul"} <= set(told["cases"][1]["rows"][0])
    page = (folder / "linear.md").read_text(encoding="utf-8")
    assert "| ours, turbo-core |" in page and told["machine"]["date"][:10] in page
    said = capsys.readouterr().out
    assert "ours, turbo-core" in said and "linear.png" in said


def test_the_picture_opens_and_shows_ours_in_its_own_colour(tiny_group, tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    run.run(["linear"], "cpu", tmp_path, quick=True)
    with image_module.open(tmp_path / "cpu" / "linear.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
        assert picture.format == "PNG" and picture.width > 600
    assert {charts.OURS, charts.BASE} <= colours


def test_an_interrupted_run_leaves_the_old_results_and_what_it_had(tiny_group, tmp_path, monkeypatch):
    run.run(["linear"], "cpu", tmp_path, quick=True)
    folder = tmp_path / "cpu"
    old = {path.name: path.read_bytes() for path in folder.iterdir()}

    def cases(device, sizes, quick):
        yield next(iter(tiny_group.cases(device, sizes, quick)))
        raise KeyboardInterrupt

    monkeypatch.setitem(run.GROUPS, "linear", (type("Group", (), {"cases": staticmethod(cases)}), 3))
    with pytest.raises(KeyboardInterrupt):
        run.run(["linear"], "cpu", tmp_path, quick=True)
    partial = json.loads((folder / "linear.partial.json").read_text(encoding="utf-8"))
    assert [case["name"] for case in partial["cases"]] == ["machine", "case 0"]
    (folder / "linear.partial.json").unlink()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old


def test_a_case_that_cannot_be_made_is_named_and_the_others_go_on(tiny_group, tmp_path, monkeypatch):
    def cases(device, sizes, quick):
        yield broken
        yield from tiny_group.cases(device, sizes, quick)

    monkeypatch.setitem(run.GROUPS, "linear", (type("Group", (), {"cases": staticmethod(cases)}), 3))
    report = run.run(["linear"], "cpu", tmp_path, quick=True)["linear"]
    assert "a case was left out: RuntimeError: no kernel image" in report["notes"]
    assert [case["name"] for case in report["cases"]] == ["machine", "case 0", "case 1"]


def test_a_file_that_cannot_be_written_is_a_person_s_error(tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(TurboError, match="could not be written"):
        report.write(tmp_path / "file" / "x.json", b"{}")


def test_without_pillow_there_is_no_picture_and_without_rich_a_plain_table(tiny_group, tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("rich", "PIL")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    run.run(["linear"], "cpu", tmp_path, quick=True)
    assert sorted(path.name for path in (tmp_path / "cpu").iterdir()) == ["linear.json", "linear.md"]
    lines = capsys.readouterr().out.splitlines()
    head = next(line for line in lines if line.strip().startswith("contender"))
    assert "of machine" in head and any(line.startswith("  ours, turbo-core") for line in lines)


# ---- the command


def test_the_groups_of_the_command_are_those_of_the_library():
    assert tuple(run.GROUPS) == BENCHMARKS == tuple(run.FORMS)


def test_shapes_go_to_the_groups_they_fit():
    groups = tuple(run.GROUPS)
    found = run.parse_shapes(["8x16x32", "1x2X300x64", "300x256"], groups)
    assert found == {
        "linear": [(8, 16, 32)], "attention": [(1, 2, 300, 64)], "streaming": [(300, 256)], "block": [(300, 256)]
    }  # fmt: skip
    for text in ("8x16", "8x0x16", "8xax9", "8x16x32x64x1"):
        with pytest.raises(TurboError, match="MxNxK for linear"):
            run.parse_shapes([text], ["linear"])


def test_bench_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "results"
    command = f"bench linear --quick --device cpu --shapes 40x128x128 --out {out}"
    assert main(command.split()) == 0
    said = capsys.readouterr().out
    assert "linear 40 x 128 x 128" in said and "torchao is not installed" in said
    assert (out / "cpu" / "linear.json").is_file()
    assert main(["bench", "linear", "--shapes", "40x128", "--out", str(out)]) == 2
    assert "MxNxK" in capsys.readouterr().err
    assert main(["bench", "linear", "--seconds", "0"]) == 2
    assert main(["bench", "linear", "--device", "cuda:99"]) == 2


def test_a_wrong_result_of_ours_is_exit_code_1(tiny_group, tmp_path, monkeypatch):
    def cases(device, sizes, quick):
        yield lambda: Case("case", {}, [contender("ours, turbo-core", error=1.0)], ("none",))

    monkeypatch.setitem(run.GROUPS, "linear", (type("Group", (), {"cases": staticmethod(cases)}), 3))
    assert main(["bench", "linear", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1


def test_check_names_what_is_wrong_and_goes_on(monkeypatch):
    few = {"LINEAR": ((5, 200, 320),), "STREAMING": ((5, 200),), "ATTENTION": ((1, 1, 130, 64),)}
    for name, shapes in few.items():
        monkeypatch.setattr(int8.quantize, name, shapes)
    with torch.no_grad():
        right = check.check("cpu", tell=pytest.fail)
    assert all(one["ok"] for one in right) and len(right) > 15
    assert {"sla kernels", "quantize_block 5 x 200"} <= {one["what"] for one in right}

    honest = linear.CHAINS[int8.quantize_rows]
    monkeypatch.setitem(linear.CHAINS, int8.quantize_rows, lambda x: (honest(x)[0] + 1, honest(x)[1]))
    told = []
    with torch.no_grad():
        found = check.check("cpu", tell=told.append)
    assert [one["what"] for one in found if not one["ok"]] == ["quantize_rows 5 x 200"]
    assert len(told) == 1 and told[0].startswith("WRONG: quantize_rows") and len(found) == len(right)


def test_tune_says_where_there_is_nothing_to_tune_and_shows_what_it_found(monkeypatch, capsys):
    from turbo_core.bench import tune

    assert main(["tune", "--device", "cpu"]) == 2
    assert "nothing to tune on cpu" in capsys.readouterr().err

    def found(device, progress, out):
        progress(0, 1, "block plain")
        return {"card": "H200", "file": str(out), "microseconds": {"block plain long": {"best": 12.3, "shipped": 15.8}}}

    monkeypatch.setattr(tune, "tune", found)
    assert main(["tune", "--device", "cpu", "-o", "table.json"]) == 0
    said = capsys.readouterr().out
    assert "table.json" in said and "12 us" in said and "16 us" in said


# ---- with kernels, through Triton's interpreter

KERNELS = """
from tests.triton_cpu.interpreter import repair

repair()
import json
import torch
from turbo_core import bench, bench_attention, bench_linear, bench_streaming

torch.set_grad_enabled(False)
cases = [
    bench_linear.linear_case("cpu", 130, 128, 128, True),
    bench_linear.fused_case("cpu", "residual", 130, 128, 128, True),
    bench_streaming.modulate_case("cpu", 130, 256, False, True),
    bench_attention.attention_case("cpu", 1, 1, 330, 64, True),
]
bench.WARM_UP = 0
wanted = ("product alone", " alone, int8", "torch path", "dense int8, turbo-core", "statistics given")
told = {
    case.name: [bench.admit(c, bench.clock_of("cpu"))[0] for c in case.contenders if c.name.endswith(wanted)]
    for case in cases
}
print(json.dumps([told, cases[-1].notes]))
"""


def test_the_kernels_take_part_alone_and_as_a_whole():
    pytest.importorskip("triton")
    said = run_python("-c", KERNELS, interpret=True)
    told, notes = json.loads(said.splitlines()[-1])
    rows = {f"{case}: {row['name']}": row for case, found in told.items() for row in found}
    assert not [row for row in rows.values() if row["status"] in ("wrong", "failed")]
    right = {name for name, row in rows.items() if row["status"] == "ok"}
    attention = "attention 1 x 1 x 330 x 64, 1 of 6 key blocks kept"
    parts = [f"{attention}: {part} alone, int8" for part in attention.STAGES]
    others = [
        f"{attention}: SLA 10%, turbo-core's torch path",
        "linear 130 x 128 x 128: row, turbo-core, product alone",
    ]
    assert {*parts, *others} <= right
    assert rows[f"{attention}: attention alone, int8"]["error"] < attention.FEW_KEYS
    assert rows[f"{attention}: dense int8, turbo-core"]["note"] == ""  # a kernel, not an emulation
    assert notes and notes[0].startswith("block map: kernel and torch twin agree on 100")
