"""Every kind of file that people have, in the nodes: loaded by ours or the host's loader, saved, and loaded again."""

import pytest
import torch

from tests.helpers.file_kinds import HOST, KINDS
from tests.helpers.states import plain
from tests.helpers.tiny_dits import tiny_state_dict

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def results(lab):
    """What the unquantized model gives, TurboWan and stock."""
    with torch.inference_mode():
        return {True: lab.denoise(lab.load()), False: lab.denoise(lab.load("tiny_wan_stock_bf16.safetensors"))}


@pytest.fixture
def by_host(comfy, monkeypatch):
    """The files that the host's own loader was asked for."""
    asked, real = [], comfy.sd.load_diffusion_model
    monkeypatch.setattr(comfy.sd, "load_diffusion_model", lambda *a, **k: asked.append(a[0]) or real(*a, **k))
    return asked


@pytest.mark.parametrize("trained", [True, False], ids=["TurboWan", "stock"])
@pytest.mark.parametrize("kind", [k for k in KINDS if not k.cure], ids=lambda kind: kind.title)
def test_every_kind_is_the_same_model(lab, results, by_host, tmp_path, kind, trained):
    state = tiny_state_dict(0)
    path = str(kind.make(state if trained else plain(state), tmp_path))
    model = lab.load(path)
    assert by_host == ([path] if kind.loads == HOST and not trained else [])
    result = lab.denoise(model)
    # the rounding of a layer shows a few times as large in what the network of random weights gives
    assert lab.distance(result, results[trained]) <= 0.005 + 4 * kind.error
    lab.pack.saving.save_model(model, str(tmp_path / "saved.safetensors"))
    again = lab.load(tmp_path / "saved.safetensors")
    assert lab.same(lab.weights(again), lab.weights(model))
    # tensors of a file are used where they lie, and float32 products of unaligned ones may round otherwise
    assert lab.distance(lab.denoise(again), result) < 5e-3


@pytest.mark.parametrize(
    ("kind", "trained"),
    [(k, trained) for k in KINDS if k.cure for trained in (True, False) if trained or k.loads != HOST],
    ids=lambda value: getattr(value, "title", {True: "TurboWan", False: "stock"}.get(value)),
)
def test_what_is_refused_has_a_cure(lab, by_host, tmp_path, kind, trained):
    """Stock files in the host's own formats with real weights: test_files.py."""
    state = tiny_state_dict(0)
    with pytest.raises(lab.pack.errors.TurboError, match=kind.cure):
        lab.load(kind.make(state if trained else plain(state), tmp_path))
    assert not by_host
