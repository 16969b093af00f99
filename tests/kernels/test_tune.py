"""The tuner runs every form of the products; the interpreter's times mean nothing."""

import pytest

from turbo_core.bench import tune
from turbo_core.kernels import int8_configs


@pytest.mark.parametrize("form", int8_configs.FORMS)
def test_every_form_is_measured_with_kernels(form, tmp_path, monkeypatch):
    some = [
        int8_configs.DEFAULT,
        int8_configs.DEFAULT._replace(depth=64),
        int8_configs.DEFAULT._replace(variant="persistent"),
    ]
    monkeypatch.setattr(tune, "candidates", lambda form, kind: some)
    monkeypatch.setattr(tune, "WARMUP", 0)
    monkeypatch.setattr(tune, "ROUNDS", 1)
    tried = []
    monkeypatch.setattr(tune, "_time", lambda call, device: tried.append(call()) or len(tried))
    path = tmp_path / "table.json"
    report = tune.tune("cpu", [tune.Case(form, "short", 5, 64, 128)], out=path)
    assert len(tried) == len(some)  # all of them run and agree
    assert report["launches"] == {f"{form} short": some[0]}
    assert int8_configs.read_table(path, "cpu") == report["launches"]
