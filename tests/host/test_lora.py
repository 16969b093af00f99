"""LoRAs on our MODELs, in the three ways the host has: merged, patched on the fly (low VRAM), and bypass."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.lab import PROJ_L, STOCK

pytestmark = pytest.mark.newer

KINDS = ["float", "block", "row"]
LAYER = "diffusion_model.blocks.1.ffn.0"
LINEARS = [f"diffusion_model.blocks.{name}" for name in ("0.self_attn.q", "0.cross_attn.o", "1.ffn.0", "1.ffn.2")]


def make_lora(lab, model, naming="diffusers", layers=LINEARS, seed=0):
    """A LoRA file's tensors for some layers of a MODEL, under the key names of one training tool."""
    lora = lab.lora(model, *layers, seed=seed)
    if naming == "diffusers":
        return lora
    sides = {"lora_A": "lora_down", "lora_B": "lora_up"}
    parts = [(name.removeprefix("diffusion_model.").rsplit(".", 2), tensor) for name, tensor in lora.items()]
    lora = {f"lora_unet_{layer.replace('.', '_')}.{sides[side]}.weight": t for (layer, side, _), t in parts}
    return lora | {name.replace("lora_up.weight", "alpha"): torch.tensor(4.0) for name in lora if "lora_up" in name}


def expected_change(lora, layer=LAYER):
    return lora[f"{layer}.lora_B.weight"] @ lora[f"{layer}.lora_A.weight"]


@pytest.mark.parametrize("naming", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_lora_acts_and_comes_off_bit_exactly(comfy, lab, kind, naming):
    model = lab.as_kind(kind)
    before, weights = lab.denoise(model), lab.weights(model)
    with_lora = lab.merged(model, make_lora(lab, model, naming))
    assert len(with_lora.patches) == len(LINEARS)
    changed = lab.denoise(with_lora)
    print("merged", kind, lab.distance(changed, before))
    assert lab.distance(changed, before) > 0.05
    assert not lab.same(lab.weights(model), weights), "a merged LoRA changes the weights in place"
    assert torch.equal(lab.denoise(model), before)
    assert lab.same(lab.weights(model), weights)
    comfy.model_management.unload_all_models()
    assert lab.same(lab.weights(with_lora), weights)


@pytest.mark.parametrize("kind", ["float", "block"])
@pytest.mark.parametrize("how", ["merged", "bypass"])
def test_lora_on_proj_l_alone(lab, kind, how):
    """proj_l is a layer like any other: it takes a LoRA by itself, and both ways agree."""
    model = lab.as_kind(kind)
    before = lab.denoise(model)
    lora = make_lora(lab, model, layers=[PROJ_L])
    changed = lab.denoise({"merged": lab.merged, "bypass": lab.bypassed}[how](model, lora))
    assert lab.distance(changed, before) > 1e-3
    network = lab.load()
    weight = network.model.get_submodule(PROJ_L).weight
    weight += expected_change(lora, PROJ_L)
    network = network if kind == "float" else lab.quantize(network)
    print("proj_l", kind, how, lab.distance(changed, lab.denoise(network)))
    assert lab.distance(changed, lab.denoise(network)) < (1e-5 if kind == "float" else 1e-2)
    assert torch.equal(lab.denoise(model), before)


def test_merged_values_are_the_sum(lab):
    """On the float model to rounding, on the quantized ones to one quantization step of the layer."""
    for kind in KINDS:
        model = lab.as_kind(kind)
        weight = lambda m: m.model.get_submodule(LAYER).weight  # noqa: E731
        before = weight(model)
        scale = before.params.scale.max().item() if kind != "float" else 1e-6
        before = before.dequantize() if kind != "float" else before.clone()
        lora = make_lora(lab, model)
        with_lora = lab.merged(model, lora, 0.5)
        lab.loaded(with_lora)
        after = weight(with_lora)
        after = after.dequantize() if kind != "float" else after
        error = (after - before - 0.5 * expected_change(lora)).abs().max().item()
        assert error < 2.5 * scale, (kind, error, scale)


def with_exact_sum(lab, comfy, model, lora, layer):
    """x0 with the sum of a layer's weights and its LoRA in float64, rounded nowhere."""
    module = comfy.utils.get_attr(lab.loaded(model), layer)
    weight = module.weight if type(module.weight) is torch.nn.Parameter else module.weight.dequantize()
    weight = weight.double() + expected_change({name: t.double() for name, t in lora.items()}, layer)

    def forward(x, input_act=None, **_):
        x = F.gelu(x, approximate="tanh") if input_act == "gelu_tanh" else x
        return F.linear(x.double(), weight, module.bias.double()).to(x.dtype)

    module.forward = forward
    try:
        return lab.denoise(model)
    finally:
        del module.forward


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", ["self_attn.q", "ffn.0", "ffn.2"])
def test_bypass_is_merged_layer_by_layer(comfy, lab, layer, kind):
    """ffn.2 is the one whose input hosts have moved about. In int8 the merged sum is rounded anew, which the weights
    beside a bypass are not: bypass is the nearer of the two to the exact sum."""
    model, layer = lab.as_kind(kind), f"diffusion_model.blocks.0.{layer}"
    lora = make_lora(lab, model, layers=[layer])
    before, exact = lab.denoise(model), with_exact_sum(lab, comfy, model, lora, layer)
    merged, bypass = (lab.denoise(with_lora(model, lora)) for with_lora in (lab.merged, lab.bypassed))
    apart, acts = lab.distance(bypass, merged), lab.distance(merged, before)
    errors = lab.distance(bypass, exact), lab.distance(merged, exact)
    print(f"{layer}, {kind}: {apart:.1e} apart, off {errors[0]:.2e} and {errors[1]:.2e}, the LoRA itself {acts:.2f}")
    assert acts > 0.05
    if kind == "float":
        assert max(apart, *errors) < 1e-5
    else:
        assert errors[0] < errors[1] and apart < errors[1] + 5e-4


@pytest.mark.parametrize("by", ["Turbo Loader", "the host's loader, then sparse attention"])
def test_bypass_on_a_stock_model_sees_what_comes_after_the_gelu(comfy, lab, by):
    """Newer hosts hand the activation to the linear, whose hooks then see what comes before it."""
    layer = "diffusion_model.blocks.0.ffn.2"
    if by == "Turbo Loader":
        model = lab.load(STOCK)
    else:
        model = lab.attention(comfy.sd.load_diffusion_model(lab.path(STOCK)), 0.3)
    lora = make_lora(lab, model, layers=[layer])
    before = lab.denoise(model)
    merged, bypass = (lab.denoise(with_lora(model, lora)) for with_lora in (lab.merged, lab.bypassed))
    assert lab.distance(merged, before) > 0.05 and lab.distance(bypass, merged) < 1e-5
    assert torch.equal(lab.denoise(model), before)


@pytest.mark.parametrize("kind", ["float", "block"])
def test_two_loras_and_another_strength(lab, kind):
    model = lab.as_kind(kind)
    first, second = make_lora(lab, model), make_lora(lab, model, "kohya", seed=50)
    one = lab.merged(model, first)
    both = lab.merged(one, second)
    a, ab = lab.denoise(one), lab.denoise(both)
    assert lab.distance(ab, a) > 0.05
    weaker = lab.denoise(lab.merged(model, first, 0.25))
    plain = lab.denoise(model)
    assert 0 < lab.distance(weaker, plain) < lab.distance(a, plain)
    assert torch.equal(lab.denoise(one), a) and torch.equal(lab.denoise(both), ab)
    off = lab.distance(lab.denoise(lab.merged(model, first, 0.0)), plain)
    assert off == 0 if kind == "float" else off < 0.03, off  # int8 sums are rounded once more, of nothing too


def test_lora_through_the_sampler(lab):
    model = lab.as_kind("block")
    before = lab.turbo(model, steps=2)
    with_lora = lab.merged(model, make_lora(lab, model))
    assert lab.distance(lab.turbo(with_lora, steps=2), before) > 0.05
    assert torch.equal(lab.turbo(model, steps=2), before)
