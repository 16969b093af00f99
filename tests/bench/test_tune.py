"""The tuner: the fastest launch that is right wins."""

import json

import pytest
import torch

from turbo_core.bench import tune
from turbo_core.cli import main
from turbo_core.errors import TurboError

int8_configs = pytest.importorskip(
    "turbo_core.kernels.int8_configs", reason="launches need triton (pip install triton)"
)

CASE = tune.Case("block plain", "long", 5, 64, 128)


def test_without_a_card_the_reason_is_named():
    with pytest.raises(TurboError, match=r"tune on cpu: .*no Triton kernels on cpu.*card with Triton"):
        tune.tune("cpu")


@pytest.fixture
def launched(monkeypatch):
    """A card whose launches take as long as `seconds` says and return what `results` says."""
    seconds, results = {}, {}

    def run(config):
        run.last = config
        result = results.get(config, torch.ones(4))
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(tune, "prove", lambda device, families: dict.fromkeys(families))
    monkeypatch.setattr(tune, "_operands", lambda case, device: run)
    monkeypatch.setattr(tune, "_time", lambda call, device: (call(), seconds.get(run.last, 1.0))[1])
    return seconds, results


def test_the_fastest_right_candidate_wins_and_is_kept(launched, tmp_path):
    seconds, results = launched
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
def test_a_candidate_is_held_to_the_plainest_launch(launched, result, caplog, tmp_path):
    seconds, results = launched
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


@pytest.mark.parametrize("kind", int8_configs.TABLE)
@pytest.mark.parametrize("form", int8_configs.FORMS)
def test_the_tuner_would_find_every_shipped_launch(form, kind):
    rows = {int8_configs.shipped(form, m, kind) for m in (1, 32760)}
    assert rows <= {int8_configs.DEFAULT, *tune.candidates(form, kind)}


def test_default_cases_are_the_whole_table():
    cases = tune.default_cases()
    assert (
        len({(case.form, case.length) for case in cases})
        == len(int8_configs.FORMS) * len(int8_configs.LENGTHS)
        == len(cases)
    )
    assert all(int8_configs._length(case.m) == case.length for case in cases)


def test_tune_says_where_there_is_nothing_to_tune_and_shows_what_it_found(monkeypatch, capsys):
    assert main(["tune", "--device", "cpu"]) == 2
    assert "nothing to tune on cpu" in capsys.readouterr().err

    def found(device, progress, out):
        progress(0, 1, "block plain")
        return {"card": "H200", "file": str(out), "microseconds": {"block plain long": {"best": 12.3, "shipped": 15.8}}}

    monkeypatch.setattr(tune, "tune", found)
    assert main(["tune", "--device", "cpu", "-o", "table.json"]) == 0
    said = capsys.readouterr().out
    assert "table.json" in said and "12 us" in said and "16 us" in said


def test_what_was_measured_stays_when_a_later_form_fails(tmp_path, launched, monkeypatch):
    path, measure, done = tmp_path / "table.json", tune._measure, []
    tune.write_table(path, "cpu", {"row plain long": int8_configs.DEFAULT})

    def broken(case, configs, device):
        if done:
            raise KeyboardInterrupt
        done.append(case)
        return measure(case, configs, device)

    monkeypatch.setattr(tune, "_measure", broken)
    with pytest.raises(KeyboardInterrupt):
        tune.tune("cpu", [CASE, CASE._replace(form="block qkv")], out=path)
    assert set(int8_configs.read_table(path, "cpu")) == {"block plain long", "row plain long"}


def test_a_form_whose_plainest_launch_fails_has_no_row(tmp_path, launched):
    path = tmp_path / "table.json"
    tune.write_table(path, "cpu", {"block plain long": int8_configs.DEFAULT})
    launched[1][int8_configs.DEFAULT] = RuntimeError("does not compile")
    tune.tune("cpu", [CASE], out=path)
    assert not json.loads(path.read_text())["launches"]
