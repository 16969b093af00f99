"""QuantizeW8A8: what it changes, what it must not, and in which order nodes may come."""

import gc
import weakref

import pytest
import torch

from tests.helpers.lab import LINEAR, PROJ_L, QUANT, STOCK, T2V
from turbo_core import checkpoint
from turbo_core.int8 import quantize_block, quantize_rows

pytestmark = pytest.mark.newer

LAYER = LINEAR.removeprefix("diffusion_model.")


@pytest.fixture
def with_lora(lab):
    return lambda model: lab.merged(model, lab.lora(model))


@pytest.mark.parametrize(("kind", "format"), [("block", "int8_block"), ("row", "int8_row")])
def test_equals_turbo_core_quantize(lab, tmp_path, kind, format):
    """The node and `turbo-core quantize` write the same bits."""
    target = tmp_path / "quantized.safetensors"
    checkpoint.quantize(lab.path(T2V), target, format)
    theirs = lab.load(target)
    assert lab.same(lab.weights(lab.quantize(lab.load(), kind)), lab.weights(theirs))


def test_equals_the_published_file(lab):
    assert lab.same(lab.weights(lab.quantize(lab.load())), lab.weights(lab.load(QUANT)))


@pytest.mark.parametrize("kind", ["block", "row"])
@pytest.mark.parametrize("name", [T2V, STOCK])
def test_source_is_untouched(lab, name, kind):
    model = lab.load(name)
    before, weights = lab.denoise(model), lab.weights(model)
    quantized = lab.quantize(model, kind)
    after = lab.denoise(quantized)
    assert 2e-3 < lab.distance(after, before) < 0.1
    assert lab.same(lab.weights(model), weights) and torch.equal(lab.denoise(model), before)
    assert torch.equal(lab.denoise(quantized), after)


def test_memory(lab):
    """A byte a weight and the scales, where the host computes in float32 as here: a quarter; half of bf16 on a card."""
    model = lab.load()
    quantized = lab.quantize(model)
    linears = sum(t.numel() for t in lab.weights(quantized).values() if t.dtype == torch.int8)
    saved = model.model_size() - quantized.model_size()
    print("saved", saved, "of", 4 * linears, "sizes", model.model_size(), quantized.model_size())
    assert 2.99 * linears < saved < 3 * linears


def test_layers_and_skipped_blocks(lab):
    def int8_layers(**settings):
        model = lab.quantize(lab.load(), **settings)
        lab.denoise(model)
        names = {n.removesuffix(".weight") for n, t in lab.weights(model).items() if t.dtype == torch.int8}
        return {n.split(".", 2)[2] for n in names}, {int(n.split(".")[1]) for n in names}, len(names)

    attention = {f"{a}.{x}" for a in ("self_attn", "cross_attn") for x in "qkvo"}
    assert int8_layers() == (attention | {"ffn.0", "ffn.2"}, {0, 1}, 20)
    assert int8_layers(layers="feed-forward") == ({"ffn.0", "ffn.2"}, {0, 1}, 4)
    assert int8_layers(layers="attention", skip_blocks="1") == (attention, {0}, 8)
    assert int8_layers(skip_blocks="0-1") == (set(), set(), 0)


@pytest.mark.parametrize(("kind", "quantize"), [("block", quantize_block), ("row", quantize_rows)])
def test_lora_before_is_baked_in(lab, with_lora, kind, quantize):
    """From the exact sum in float32, rounded once."""
    model = lab.load()
    lora = lab.lora(model)
    patched = lab.merged(model, lora, 0.7)
    weight = lab.weights(model)[f"{LAYER}.weight"]
    expected = weight + 0.7 * (lora[f"{LINEAR}.lora_B.weight"] @ lora[f"{LINEAR}.lora_A.weight"])
    quantized = lab.quantize(patched, kind)
    assert not quantized.patches
    got = lab.weights(quantized)
    weight_q, scale = quantize(expected)
    assert (got[f"{LAYER}.weight"].int() - weight_q.int()).abs().max() <= 1
    torch.testing.assert_close(got[f"{LAYER}.weight_scale"], scale)
    other = {k: v for k, v in lab.weights(lab.quantize(model, kind)).items() if LAYER not in k}
    assert lab.same({k: got[k] for k in other}, other)


def test_lora_on_layers_that_stay_float_stays_a_lora(lab, with_lora):
    """proj_l, and blocks that are skipped: still removable and part of the result."""
    for layer, settings in [
        (PROJ_L, {}),
        (LINEAR, {"skip_blocks": "0"}),
    ]:
        model = lab.load()
        patched = lab.merged(model, lab.lora(model, layer))
        quantized = lab.quantize(patched, **settings)
        assert list(quantized.patches) == [f"{layer}.weight"]
        plain = lab.quantize(model, **settings)
        assert lab.distance(lab.denoise(quantized), lab.denoise(plain)) > 1e-3
        assert lab.same(lab.weights(plain), lab.weights(lab.quantize(model, **settings)))


@pytest.mark.parametrize("kind", ["block", "row"])
def test_lora_before_and_after_are_near(lab, with_lora, kind):
    model = lab.load()
    plain = lab.denoise(lab.quantize(model, kind))
    before = lab.denoise(lab.quantize(with_lora(model), kind))
    after = lab.denoise(with_lora(lab.quantize(model, kind)))
    print("before / after", kind, lab.distance(before, after), lab.distance(before, plain))
    assert lab.distance(before, plain) > 0.1
    assert lab.distance(before, after) < 0.03


def test_same_format_again_keeps_every_bit(lab, with_lora):
    model = lab.load(QUANT)
    weights = lab.weights(model)
    assert lab.same(lab.weights(lab.quantize(model)), weights)
    # also while another clone's LoRA is merged into the shared weights
    lab.loaded(with_lora(model))
    assert not lab.same(lab.weights(model), weights)
    assert lab.same(lab.weights(lab.quantize(model)), weights)
    assert lab.same(lab.weights(lab.quantize(model, skip_blocks="0")), weights)


def test_other_format_and_lora_on_a_quantized_file(lab, with_lora):
    model = lab.load(QUANT)
    row = lab.quantize(model, "row")
    assert lab.weights(row)[f"{LAYER}.weight_scale"].shape == (512, 1)
    assert lab.distance(lab.denoise(row), lab.denoise(lab.load())) < 0.05
    baked = lab.quantize(with_lora(model))
    changed = [k for k, v in lab.weights(baked).items() if not torch.equal(v, lab.weights(model)[k])]
    assert sorted(changed) == [f"{LAYER}.weight", f"{LAYER}.weight_scale"]


def test_quantizing_a_clone_while_a_lora_is_merged(lab, with_lora):
    """Clones share weights: what one has merged must not get into what the other quantizes."""
    model = lab.load()
    clean = lab.weights(lab.quantize(model))
    patched = lab.merged(model, lab.lora(model))
    lab.loaded(patched)
    assert lab.same(lab.weights(lab.quantize(model)), clean)
    assert not lab.same(lab.weights(lab.quantize(patched)), clean)


@pytest.mark.parametrize("name", [T2V, STOCK])
def test_order_with_the_attention_node_does_not_matter(lab, name):
    model = lab.load(name)
    settings = {"topk": 0.4, "dense_blocks": "1"}
    a = lab.denoise(lab.quantize(lab.attention(model, **settings)))
    b = lab.denoise(lab.attention(lab.quantize(model), **settings))
    assert torch.equal(a, b)
    assert not torch.equal(a, lab.denoise(lab.quantize(model)))


def test_settings_of_other_nodes_are_carried_along(comfy, lab):
    """Sampling shift, wrappers, callbacks, model options, attachments: all as on the source, on both orders."""
    import nodes

    model = nodes.NODE_CLASS_MAPPINGS.get("ModelSamplingSD3")
    if model is None:
        from comfy_extras.nodes_model_advanced import ModelSamplingSD3 as model
    patched = model().patch(lab.load(), 5.0)[0]
    calls = []
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    patched.add_wrapper_with_key(kind, "ours", lambda run, *args, **kw: calls.append(1) or run(*args, **kw))
    patched.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_LOAD, "ours", lambda *args: calls.append(2))
    patched.set_model_compute_dtype(torch.float32)
    patched.model_options["transformer_options"]["note"] = "kept"
    quantized = lab.quantize(patched)
    assert quantized.get_model_object("model_sampling").shift == 5.0
    assert quantized.model_options["transformer_options"]["note"] == "kept"
    assert quantized.force_cast_weights
    assert quantized.get_attachment(lab.pack.loading.SOURCE) is patched.get_attachment(lab.pack.loading.SOURCE)
    lab.turbo(quantized, steps=1)
    assert calls == [2, 1]
    quantized.model_options["transformer_options"]["note"] = "changed"
    assert patched.model_options["transformer_options"]["note"] == "kept"


def test_hosts_factory_makes_the_same_model_again(lab, with_lora):
    """The host reloads a MODEL through cached_patcher_init, on a second GPU or without dynamic VRAM."""
    patched = with_lora(lab.load())
    quantized = lab.quantize(patched)
    for model in (lab.load(), quantized):
        factory, arguments = model.cached_patcher_init
        again = factory(*arguments, disable_dynamic=True)
        assert lab.same(lab.weights(again), lab.weights(model))
    copy = quantized.deepclone_multigpu(new_load_device=quantized.load_device)
    assert copy.model is not quantized.model
    assert torch.equal(lab.denoise(copy), lab.denoise(quantized))


def test_what_is_tied_to_the_old_network_is_refused(comfy, lab):
    """A compiled network, a bypass LoRA, patched layers: silently left out, the result would be another one."""
    bypassed = lab.bypassed(lab.load(), lab.lora(lab.load()))
    patched = lab.load()
    patched.add_object_patch("diffusion_model.blocks.0.self_attn.forward", lambda *args, **kwargs: None)
    compiled = lab.load()
    compiled.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "torch.compile", lambda *a, **k: None)
    elsewhere = lab.load()
    elsewhere.set_additional_models("multigpu", [lab.load()])
    for model, name in (
        (elsewhere, "MultiGPU CFG Split"),
        (bypassed, "bypass_lora"),
        (patched, "self_attn.forward"),
        (compiled, "TorchCompileModel"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*after QuantizeW8A8"):
            lab.quantize(model)


def test_interrupt_while_quantizing(comfy, lab):
    model = lab.load()
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        lab.quantize(model)
    assert lab.same(lab.weights(lab.quantize(model)), lab.weights(lab.load(QUANT)))


def test_every_int8_layer_multiplies_in_int8(lab, monkeypatch):
    """Called by the layer itself: F.linear reaches the layout under inference_mode only, and silently not elsewhere."""
    calls, real = [], lab.pack.ops.int8_linear
    monkeypatch.setattr(lab.pack.ops, "int8_linear", lambda x, *args: calls.append(x.shape[-1]) or real(x, *args))
    lab.denoise(lab.quantize(lab.load(), layers="feed-forward"))
    assert calls == [256, 512] * 2


def test_source_can_go(comfy, lab):
    """Nothing of the quantized MODEL keeps the large one in memory."""
    model = lab.load(dtype=torch.float32)
    watched = weakref.ref(model.model)
    quantized = lab.quantize(model)
    expected = lab.denoise(quantized)
    del model
    comfy.model_management.cleanup_models()
    gc.collect()
    assert watched() is None
    assert torch.equal(lab.denoise(quantized), expected)


@pytest.mark.parametrize("computes", [False, True])
def test_formats_that_the_card_does_not_multiply_stay_in_full_precision(comfy, lab, monkeypatch, computes):
    """As the host's own loader has them, also in layers that stay as they were."""
    part = lab.pack.part("nodes.host.ops")
    monkeypatch.delattr(comfy.ops, "get_disabled_quant_formats", raising=False)
    for kind in ("fp8", "nvfp4", "mxfp8"):
        name = f"supports_{kind}_compute"
        monkeypatch.setattr(comfy.model_management, name, lambda device=None: computes, raising=False)
    assert part._disabled() == (set() if computes else {"float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8"})
