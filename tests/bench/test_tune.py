import json
import logging
from pathlib import Path

import pytest
import torch

from tests.triton_cpu.process import run_pytest
from turbo_core import dispatch
from turbo_core.bench import tune
from turbo_core.errors import TurboError

triton = pytest.importorskip("triton", reason="the Triton tests need triton (pip install triton)")
int8_configs = pytest.importorskip("kernels.int8_configs")

CARD = "NVIDIA Test 9000"
CPU = torch.device("cpu")
CASE = tune.Case("block plain", "long", 5, 64, 128)


def test_without_a_card_the_reason_is_named():
    with pytest.raises(TurboError, match=r"tune on cpu: .*no Triton kernels on cpu.*card with Triton"):
        tune.tune("cpu")


@pytest.fixture
def card(monkeypatch):
    """A card whose launches take as long as `seconds` says and return what `results` says."""
    seconds, results = {}, {}

    def run(config):
        run.last = config
        result = results.get(config, torch.ones(4))
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(dispatch, "why_not", lambda device, family: None)
    monkeypatch.setattr(tune, "_operands", lambda case, device: run)
    monkeypatch.setattr(tune, "_time", lambda call, device: (call(), seconds.get(run.last, 1.0))[1])
    return seconds, results


def test_the_fastest_right_candidate_wins_and_is_kept(card, tmp_path):
    seconds, results = card
    wrong, broken, slow, best = tune.candidates(CASE.form, None)[1:5]
    seconds.update({wrong: 0.1, broken: 0.1, slow: 0.6, best: 0.5})
    results[wrong] = torch.tensor([1.0, 1.0, 1.0, torch.nan])
    results[broken] = RuntimeError("out of registers")
    steps, path = [], tmp_path / "new" / "table.json"
    report = tune.tune("cpu", [CASE], progress=lambda *step: steps.append(step), out=path)
    assert report["launches"] == {"block plain long": best}
    assert report["microseconds"]["block plain long"] == {"best": 0.5e6, "shipped": 1e6}
    assert report["file"] == str(path) and report["card"] == "cpu"
    assert int8_configs.read_table(path, "cpu") == report["launches"]
    assert steps == [(0, 1, "block plain, 5 x 64 x 128"), (1, 1, str(path))]


@pytest.mark.parametrize(
    "result", [torch.ones(4) * 1.02, torch.tensor([1, 1, 1, torch.inf]), torch.ones(4) * torch.nan]
)
def test_a_candidate_is_held_to_the_plainest_launch(card, result, caplog, tmp_path):
    seconds, results = card
    wrong = tune.candidates(CASE.form, None)[1]
    seconds[wrong], results[wrong] = 0.1, result
    report = tune.tune("cpu", [CASE], out=tmp_path / "table.json")
    assert report["launches"]["block plain long"] == int8_configs.DEFAULT
    assert "wrong results" in caplog.text


@pytest.mark.parametrize("kind", [*int8_configs.TABLE, None])
@pytest.mark.parametrize("form", int8_configs.FORMS)
def test_candidates_are_launches_that_a_table_may_hold(form, kind):
    tried = tune.candidates(form, kind)
    assert len(tried) == len(set(tried))
    for config in [*tried, *(int8_configs.shipped(form, m, kind) for m in (1, 32760))]:
        assert int8_configs._checked(f"{form} long", json.loads(json.dumps(config))) == config
        assert kind in ("sm_90", "sm_100", "sm_120") or config.variant == "pointers"


def test_default_cases_are_the_whole_table():
    cases = tune.default_cases()
    assert (
        len({(case.form, case.length) for case in cases})
        == len(int8_configs.FORMS) * len(int8_configs.LENGTHS)
        == len(cases)
    )
    assert all(int8_configs._length(case.m) == case.length for case in cases)


TABLE = {"block plain long": int8_configs.DEFAULT._replace(stages=4), "row qkv short": int8_configs.DEFAULT}


def test_a_table_is_read_back_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "table.json"
    for _ in range(2):
        tune.write_table(path, CARD, TABLE)
    assert int8_configs.read_table(path, CARD) == TABLE
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_sees_a_whole_table_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    tune.write_table(path, CARD, TABLE)
    monkeypatch.setattr(tune.json, "dumps", lambda *_, **__: pytest.fail("disk full"))
    with pytest.raises(pytest.fail.Exception):
        tune.write_table(path, CARD, {})
    assert int8_configs.read_table(path, CARD) == TABLE


def changed(**change):
    return json.dumps({"card": CARD, "triton": triton.__version__, "launches": TABLE} | change)


@pytest.mark.parametrize(
    "text",
    [
        changed()[:40],
        "",
        "[]",
        "{}",
        "\x00\xff",
        changed(card="NVIDIA Other"),
        changed(triton="3.0.0"),
        changed(launches=None),
        changed(launches={"block plain long": ["pointers", 128, 128, 128, 8, 8]}),
        changed(launches={"block plain long": ["pointers", 96, 128, 128, 8, 8, 3]}),
        changed(launches={"block plain long": ["pointers", 128, 128, 128, 0, 8, 3]}),
        changed(launches={"block plain long": ["magic", 128, 128, 128, 8, 8, 3]}),
        changed(launches={"block quantize long": ["pointers", 64, 128, 128, 8, 4, 3]}),
        changed(launches={"block plain huge": ["pointers", 128, 128, 128, 8, 8, 3]}),
        changed(launches={"block plain long": "pointers"}),
    ],
)
def test_a_damaged_or_foreign_table_is_ignored_with_one_line(text, tmp_path, caplog):
    path = tmp_path / "table.json"
    path.write_bytes(text.encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        assert int8_configs.read_table(path, CARD) == {}
    assert len(caplog.records) == 1 and str(path) in caplog.text and "turbo-core tune" in caplog.text


def test_no_table_is_no_news(tmp_path, caplog):
    assert int8_configs.read_table(tmp_path / "none.json", CARD) == {} and not caplog.records


def test_where_a_table_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("TURBOWAN_CACHE", str(tmp_path))
    assert int8_configs.table_path(CARD) == tmp_path / "launch-nvidia-test-9000.json"
    monkeypatch.delenv("TURBOWAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert int8_configs.table_path(CARD) == tmp_path / "turbowan" / "launch-nvidia-test-9000.json"


@pytest.mark.parametrize(
    "capability, kind",
    [((7, 5), None), ((8, 6), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90"), ((10, 3), "sm_100"), ((12, 1), "sm_120")],
)
def test_a_card_takes_the_newest_row_that_is_not_newer(capability, kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert int8_configs.card_kind.__wrapped__(torch.device("cuda")) == kind
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert int8_configs.card_kind.__wrapped__(torch.device("cuda")) == "hip"


def test_a_tuned_launch_takes_the_place_of_the_shipped_one(monkeypatch):
    monkeypatch.setattr(int8_configs, "tuned_table", lambda device: TABLE)
    monkeypatch.setattr(int8_configs, "card_kind", lambda device: "sm_90")
    device = torch.device("cuda")
    assert int8_configs.config("block plain", 32760, device) == TABLE["block plain long"]
    assert int8_configs.config("block plain", 512, device) == int8_configs.shipped("block plain", 512, "sm_90")
    assert int8_configs.config("block plain", 32760, CPU, "sm_90") == int8_configs.shipped(
        "block plain", 32760, "sm_90"
    )


def test_the_tuner_runs_the_kernels():
    run_pytest(Path(__file__).parent / "kernels" / "tune_interpreted.py", interpret=True, timeout=900)
