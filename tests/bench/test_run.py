"""A benchmark as a whole: its files, what an interruption leaves, the command."""

import json
import sys

import pytest
import torch

from turbo_core.bench import machine, report, run
from turbo_core.bench.harness import Case, Contender
from turbo_core.cli import main
from turbo_core.cli.bench import BENCHMARKS
from turbo_core.diagnostics import charts
from turbo_core.errors import TurboError


def broken():
    raise RuntimeError("no kernel image\nfor this device")


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


def test_the_groups_of_the_command_are_those_of_the_library():
    assert tuple(run.GROUPS) == BENCHMARKS == tuple(run.FORMS)


def test_shapes_go_to_the_groups_they_fit():
    groups = tuple(run.GROUPS)
    found = run.parse_shapes(["8x16x32", "1x2X300x64", "300x256", "1x8x5x24x16"], groups)
    assert found == {
        "linear": [(8, 16, 32)], "attention": [(1, 2, 300, 64)], "streaming": [(300, 256)], "block": [(300, 256)],
        "vae": [(1, 8, 5, 24, 16)],
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
        yield lambda: Case(
            "case", {}, [Contender("ours, turbo-core", lambda: lambda: None, lambda result: 1.0, 1e-2)], ("none",)
        )

    monkeypatch.setitem(run.GROUPS, "linear", (type("Group", (), {"cases": staticmethod(cases)}), 3))
    assert main(["bench", "linear", "--quick", "--device", "cpu", "--out", str(tmp_path)]) == 1
