"""The attention settings of a MODEL: what they decide, whose they are, and what they cost in one evaluation."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.lab import STOCK, T2V
from turbo_core import checkpoint
from turbo_core.wan import WanModel

pytestmark = pytest.mark.newer

MODELS = [T2V, STOCK]


@pytest.mark.parametrize("name", MODELS)
def test_settings_decide_which_attention_is_sparse(lab, sparse_calls, name):
    base = lab.load(name)
    for settings, expected in [
        ({}, 2),
        ({"dense_blocks": "0"}, 1),
        ({"dense_blocks": "0-1"}, 0),
        ({"min_tokens": 360}, 2),
        ({"min_tokens": 361}, 0),
        ({"mode": "dense"}, 0),
        ({"mode": "sparse only"}, 2),
    ]:
        sparse_calls.clear()
        lab.denoise(lab.attention(base, **settings))
        assert len(sparse_calls) == expected, settings


@pytest.mark.parametrize("name", MODELS)
def test_blocks_by_cumulative_score(lab, name):
    """Coverage decides, top-k does not; 1 is dense; the standalone attention with the same coverage agrees."""
    base = lab.load(name)
    by_score = {"selection": "cumulative score"}
    low, high, everything = (lab.denoise(lab.attention(base, 0.1, coverage=c, **by_score)) for c in (0.2, 0.8, 1.0))
    assert torch.equal(lab.denoise(lab.attention(base, 0.9, coverage=0.2, **by_score)), low)
    dense = lab.denoise(lab.attention(base, 1.0))
    assert torch.equal(everything, dense)
    assert lab.distance(low, dense) > lab.distance(high, dense) > 1e-4
    assert torch.equal(lab.denoise(lab.attention(base, 0.1, coverage=0.2)), lab.denoise(lab.attention(base, 0.1)))


def test_auto_is_what_the_model_was_trained_for_and_what_computes_fast_here(lab, monkeypatch):
    """0.15 with a trained branch, coverage without one; int8 only where its kernels are proved."""

    def set_to(model, *given, **settings):
        options = lab.attention(model, *given, **settings).model_options["transformer_options"]
        return options[lab.pack.settings.OPTIONS]

    trained, stock = lab.load(T2V), lab.load(STOCK)
    assert set_to(trained, 0, "auto") == set_to(trained, 0.15, "bf16")
    by_score = {"selection": "cumulative score", "coverage": 0.6}
    for model, mode in ((stock, "auto"), (trained, "sparse only")):
        given = set_to(model, 0, "auto", mode=mode, coverage=0.6)
        assert given | {"topk": 0.3} == set_to(model, 0.3, "bf16", mode=mode, **by_score)
    assert set_to(trained, 0, "auto", **by_score)["coverage"] == 0.6
    part = lab.pack.part("turbo_core.dispatch")
    monkeypatch.setitem(part._verdicts, (torch.device("cpu"), "sla"), None)
    assert set_to(trained, 0.1, "auto")["precision"] == "int8"
    assert set_to(trained, 0.1, "bf16")["precision"] == "bf16"


@pytest.mark.parametrize("name", MODELS)
def test_percent_window_of_steps(lab, sparse_calls, name):
    """start and end percent are those of the host: sampling progress, turned to sigmas by the model's own rule."""
    base = lab.load(name)
    sampling = base.get_model_object("model_sampling")
    edge = sampling.percent_to_sigma(0.5)
    for settings, sigma, expected in [
        ({"start_percent": 0.5}, edge + 0.01, 0),
        ({"start_percent": 0.5}, edge - 0.01, 2),
        ({"end_percent": 0.5}, edge + 0.01, 2),
        ({"end_percent": 0.5}, edge - 0.01, 0),
        ({"start_percent": 1.0, "end_percent": 1.0}, 0.5, 0),
    ]:
        sparse_calls.clear()
        lab.denoise(lab.attention(base, **settings), sigma=sigma)
        assert len(sparse_calls) == expected, (settings, sigma)


def test_settings_belong_to_a_clone(lab):
    base = lab.load(T2V)
    before = lab.denoise(base)
    low, high = lab.attention(base, 0.1), lab.attention(base, 0.9)
    a, b = lab.denoise(low), lab.denoise(high)
    assert not torch.equal(a, b)
    assert torch.equal(lab.denoise(low), a) and torch.equal(lab.denoise(base), before)
    assert lab.pack.settings.OPTIONS not in base.model_options["transformer_options"]
    again = lab.attention(low, 0.9)
    assert torch.equal(lab.denoise(again), b) and torch.equal(lab.denoise(low), a)


@pytest.mark.parametrize("tokens", [24, 360])
def test_cross_attention_stays_dense(lab, sparse_calls, tokens):
    """Also where there are as many text tokens as video tokens, which a 256x256 video of 5 frames has (512)."""
    model = lab.attention(lab.load("tiny_wan_stock_bf16.safetensors"), 0.3)
    given = lab.inputs()
    given["c_crossattn"] = lab.draw(1, tokens, 64, seed=5)
    options = {**model.model_options["transformer_options"], "sigmas": given["t"]}
    out = lab.loaded(model).apply_model(**given, transformer_options=options)
    network = WanModel.from_state_dict(checkpoint.load(lab.path(MODELS[1]))[0], torch.float32)
    expected = given["x"] - 0.9 * network(given["x"], 1000 * given["t"], given["c_crossattn"], topk=0.3)
    assert sparse_calls == [360, 360]
    assert lab.difference(out, expected) < 1e-4


# on a stock model ours is an override itself, and one that comes later and forgets it replaces it: the host's rule
@pytest.mark.parametrize(("name", "ours_first"), [(MODELS[0], True), (MODELS[0], False), (MODELS[1], False)])
def test_coexists_with_another_attention_override(lab, sparse_calls, name, ours_first):
    """Another node's override still gets every attention that is not ours."""
    seen = []

    def override(func, q, k, *args, **kwargs):
        seen.append(k.shape[1])
        return func(q, k, *args, **kwargs)

    model = lab.load(name).clone()
    plain = lab.denoise(lab.attention(model, 0.3))
    if ours_first:
        model = lab.attention(model, 0.3)
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    if not ours_first:
        model = lab.attention(model, 0.3)
    sparse_calls.clear()
    seen.clear()
    out = lab.denoise(model)
    assert len(sparse_calls) == 2
    assert seen == [24, 24]  # the two cross-attentions
    assert torch.equal(out, plain)


def test_attn1_patch_of_other_nodes_runs(lab):
    model = lab.attention(lab.load(T2V), 0.3)
    shapes = []

    def patch(args):
        shapes.append((tuple(args["x"].shape), tuple(args["q"].shape)))
        return args["x"] * 0.5

    before = lab.denoise(model)
    model.set_model_attn1_patch(patch)
    assert lab.difference(lab.denoise(model), before) > 1e-3
    assert shapes == [((1, 360, 256), (1, 360, 2, 128))] * 2


def test_other_head_dims_fall_back_with_one_line(comfy, lab, sparse_calls, tmp_path, caplog):
    """Four heads of 64 are sparse, eight of 32 dense; the reason is said once, not 80 times."""
    weights = load_file(lab.path(MODELS[1]))
    for heads, expected in ((4, 2), (8, 0)):
        path = tmp_path / f"{heads}.safetensors"
        config = json.dumps({"transformer": {"num_heads": heads, "text_dim": 64}})
        save_file(weights, path, {"config": config})
        model = lab.attention(comfy.sd.load_diffusion_model(str(path)), 0.3)
        sparse_calls.clear()
        with caplog.at_level("INFO"):
            lab.denoise(model)
            assert len(sparse_calls) == expected, heads
            lab.denoise(model)
    assert len([r for r in caplog.records if "head_dim 32" in r.getMessage()]) == 1


def test_other_dtypes_fall_back_with_one_line(lab, sparse_calls, caplog):
    options = lab.attention(lab.load(MODELS[1]), 0.3).model_options["transformer_options"]
    attention, q = options[lab.pack.override.OVERRIDE], lab.draw(1, 300, 128)
    for dtype in (torch.float64, torch.float32, torch.float64):
        for block in (0, 1):
            given = {**options, "block_index": block, "sigmas": torch.tensor([0.5])}
            with caplog.at_level("INFO"):
                x = q.to(dtype)
                out = attention(lambda q, *_, **__: q, x, x, x, 1, transformer_options=given)
            assert torch.equal(out, x) == (dtype == torch.float64)
    assert sparse_calls == [300, 300]
    assert len([r for r in caplog.records if "float64" in r.getMessage()]) == 1


class Counted:
    """sigmas of one evaluation that count how often they are read."""

    def __init__(self, sigma):
        self.sigma, self.reads = sigma, 0

    def max(self):
        self.reads += 1
        return torch.tensor(self.sigma)


def test_sigma_is_read_once_for_all_blocks(lab):
    """Each read would let the host wait for the card, 40 times a step."""
    part = lab.pack.settings
    settings = {**part.DEFAULTS, "sigma_start": 0.7}
    options = {part.OPTIONS: settings}
    for sigma, expected in ((0.5, settings), (0.9, None)):  # the second evaluation comes with the same options
        options["sigmas"] = Counted(sigma)
        for options["block_index"] in range(4):
            assert part.active_settings(options, 360, 64) is expected
        assert options["sigmas"].reads == 1


def test_a_call_for_another_shape_of_result_is_not_ours(lab):
    model = lab.attention(lab.load(STOCK), 0.3)
    options = {**model.model_options["transformer_options"], "block_index": 0}
    q = torch.randn(1, 130, 128, generator=torch.Generator().manual_seed(0))
    for extra, given in (({}, 0), ({"skip_output_reshape": False}, 0), ({"skip_output_reshape": True}, 1)):
        seen = []
        options["optimized_attention_override"](
            lambda *args, seen=seen, **kwargs: seen.append(kwargs), q, q, q, 2, transformer_options={**options}, **extra
        )
        assert len(seen) == given
    assert seen[0]["skip_output_reshape"]


def test_options_of_a_stock_model_leave_another_models_trained_branch_alone(lab):
    """DualModelGuider evaluates the negative MODEL by the options of the positive one."""
    trained, stock = lab.load(T2V), lab.load(STOCK)
    own = lab.denoise(lab.attention(trained, 0.3))
    borrowed = trained.clone()
    theirs = lab.attention(stock, 0.3).model_options["transformer_options"]["turbowan_attention"]
    borrowed.model_options["transformer_options"]["turbowan_attention"] = theirs
    assert torch.equal(lab.denoise(borrowed), own)
    assert not torch.equal(lab.denoise(lab.attention(trained, 0.3, mode="sparse only")), own)
