"""LoRAs of every kind: merged, low VRAM, bypass, baked in before quantizing; on float, block and row weights."""

import pytest
import torch

from tests.helpers.lora_files import MAKERS, spelled

pytestmark = pytest.mark.newer

KINDS = ["float", "block", "row"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", MAKERS)
def test_merged_lowvram_and_bypass_agree_and_come_off(comfy, lab, network, what, kind):
    model = lab.as_kind(kind)
    lora = MAKERS[what](lab, network)
    before, weights = lab.denoise(model), lab.weights(model)
    merged = lab.merged(model, lora)
    full = lab.denoise(merged)
    assert lab.distance(full, before) > 0.05
    assert torch.equal(lab.denoise(model), before) and lab.same(lab.weights(model), weights)

    comfy.model_management.unload_all_models()
    assert lab.same(lab.weights(model), weights)
    merged.patch_model(device_to=merged.load_device, lowvram_model_memory=1)
    assert merged.model.lowvram_patch_counter > 0
    low = merged.model.apply_model(**lab.inputs(), transformer_options={})
    in_place = what == "diff"  # norms and modulation
    assert in_place or lab.same(lab.weights(model), weights), "nothing is merged here"
    merged.unpatch_model(merged.offload_device)
    assert lab.same(lab.weights(model), weights)

    bypass = lab.bypassed(model, lora)
    through = lab.denoise(bypass)
    assert in_place or lab.same(lab.weights(model), weights), "nor here"
    assert torch.equal(lab.denoise(model), before) and lab.same(lab.weights(model), weights)
    print(f"{what}, {kind}: lowvram {lab.distance(low, full):.2g}, bypass {lab.distance(through, full):.2g}")
    assert lab.distance(low, full) < (1e-5 if kind == "float" else 0.03)
    if what == "DoRA":
        assert lab.distance(through, full) > 0.04, "the host's bypass has learnt it: TurboLoraReport says otherwise"
    else:
        assert lab.distance(through, full) < (1e-5 if kind == "float" else 0.03)


@pytest.mark.parametrize("what", MAKERS)
def test_baked_in_before_quantizing(comfy, lab, network, what):
    """Before or after QuantizeW8A8: near each other, far from nothing; what is not a weight stays a patch."""
    lora = MAKERS[what](lab, network)
    model = lab.as_kind("float")
    patched = lab.merged(model, lora)
    float_ = lab.denoise(patched)
    for kind in ("block", "row"):
        before = lab.denoise(lab.quantize(patched, kind))
        after = lab.denoise(lab.merged(lab.quantize(model, kind), lora))
        print(f"{what}, {kind}: before {lab.distance(before, float_):.4f}, after {lab.distance(after, float_):.4f}")
        assert lab.distance(before, float_) < 0.05
        assert lab.distance(after, float_) < 0.06


@pytest.mark.parametrize("kind", KINDS)
def test_another_strength_reloads_nothing(comfy, lab, network, monkeypatch, kind):
    """One network under all clones: no file is read, layers without a LoRA stay where they lie."""
    model = lab.as_kind(kind)
    lora = spelled(lab, network, "kohya")
    lab.denoise(model)

    def place():
        weight = model.model.diffusion_model.blocks[0].ffn[0].weight
        return (weight if kind == "float" else weight._qdata).data_ptr()

    untouched = place()

    def read(*args, **kwargs):
        raise AssertionError("a file was read")

    monkeypatch.setattr(comfy.utils, "load_torch_file", read)
    monkeypatch.setattr(lab.pack.loading.checkpoint, "load", read)
    outs = []
    for strength in (0.25, 0.5, 1.0, 0.25):
        patched = lab.merged(model, lora, strength)
        outs.append(lab.denoise(patched))
        assert patched.model is model.model and patched.clone_base_uuid == model.clone_base_uuid
        assert place() == untouched
    assert torch.equal(outs[0], outs[3])
    assert lab.distance(outs[1], outs[0]) > 0.02 and lab.distance(outs[2], outs[1]) > 0.02
