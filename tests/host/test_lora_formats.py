"""LoRA files in the spellings and kinds that people have: merged, low VRAM, bypass; on float, block and row weights."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.lab import STOCK, flux

RANK, ALPHA = 4, 8.0
LAYERS = ["blocks.0.self_attn.q", "blocks.0.cross_attn.o", "blocks.1.ffn.0", "blocks.1.ffn.2"]
KINDS = ["float", "block", "row"]
DIFFUSERS = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.0.cross_attn.o": "blocks.0.attn2.to_out.0",
    "blocks.1.ffn.0": "blocks.1.ffn.net.0.proj",
    "blocks.1.ffn.2": "blocks.1.ffn.net.2",
}


def underscored(prefix):
    return lambda layer: prefix + layer.replace(".", "_")


def factors(lab, layer, network):
    rows, cols = network.get_submodule(layer).weight.shape
    seed = 2 * LAYERS.index(layer)
    return lab.draw(RANK, cols, seed=seed) * cols**-0.5, lab.draw(rows, RANK, seed=seed + 1) * 0.3


# spelling: (layer -> name, down, up, alpha in the file, read by the host's own nodes)
SPELLINGS = {
    "kohya": (underscored("lora_unet_"), "lora_down.weight", "lora_up.weight", True, True),
    "Wan Fun": (underscored("lora_unet__"), "lora_down.weight", "lora_up.weight", True, False),
    "ComfyUI, lightx2v": (lambda n: f"diffusion_model.{n}", "lora_down.weight", "lora_up.weight", True, True),
    "diffusion-pipe": (lambda n: f"diffusion_model.{n}", "lora_A.weight", "lora_B.weight", False, True),
    "DiffSynth": (lambda n: n, "lora_A.default.weight", "lora_B.default.weight", False, False),
    "PEFT": (lambda n: f"base_model.model.{n}", "lora_A.weight", "lora_B.weight", False, False),
    "PEFT, named": (lambda n: f"base_model.model.{n}", "lora_A.mine.weight", "lora_B.mine.weight", False, False),
    "diffusers": (lambda n: f"transformer.{DIFFUSERS[n]}", "lora_A.weight", "lora_B.weight", False, False),
    "diffusers, low noise": (lambda n: f"transformer_2.{DIFFUSERS[n]}", "lora_A.weight", "lora_B.weight", False, False),
    "diffusers, old": (lambda n: f"transformer.{DIFFUSERS[n]}", "lora.down.weight", "lora.up.weight", False, False),
    "SimpleTuner": (lambda n: underscored("lycoris_")(DIFFUSERS[n]), "lora_down.weight", "lora_up.weight", True, False),
}


def spelled(lab, network, spelling):
    name, down, up, alpha, _ = SPELLINGS[spelling]
    lora = {}
    for layer in LAYERS:
        first, second = factors(lab, layer, network)
        lora[f"{name(layer)}.{down}"], lora[f"{name(layer)}.{up}"] = first, second
        if alpha:
            lora[f"{name(layer)}.alpha"] = torch.tensor(ALPHA)
    return lora


def loha(lab, network):
    lora = {}
    for layer in LAYERS:
        rows, cols = network.get_submodule(layer).weight.shape
        first, second = factors(lab, layer, network)
        name = f"lora_unet_{layer.replace('.', '_')}"
        lora |= {f"{name}.hada_w1_a": second, f"{name}.hada_w1_b": first * cols**0.5}
        lora |= {f"{name}.hada_w2_a": lab.draw(rows, RANK, seed=70) * 0.3, f"{name}.hada_w2_b": first}
        lora[f"{name}.alpha"] = torch.tensor(float(RANK))
    return lora


def lokr(lab, network, low=True):
    lora = {}
    for seed, layer in enumerate(LAYERS):
        rows, cols = network.get_submodule(layer).weight.shape
        name = f"lora_unet_{layer.replace('.', '_')}"
        lora[f"{name}.lokr_w1"] = lab.draw(4, 4, seed=seed) * 0.5
        if low:
            lora[f"{name}.lokr_w2_a"] = lab.draw(rows // 4, RANK, seed=seed + 1)
            lora[f"{name}.lokr_w2_b"] = lab.draw(RANK, cols // 4, seed=seed + 2) * cols**-0.5
        else:
            lora[f"{name}.lokr_w2"] = lab.draw(rows // 4, cols // 4, seed=seed + 1) * cols**-0.5
        lora[f"{name}.alpha"] = torch.tensor(float(RANK))
    return lora


def dora(lab, network):
    lora = spelled(lab, network, "kohya")
    for layer in LAYERS:
        norm = network.get_submodule(layer).weight.float().norm(dim=1, keepdim=True)
        lora[f"lora_unet_{layer.replace('.', '_')}.dora_scale"] = norm * (1 + 0.2 * lab.draw(len(norm), 1, seed=3))
    return lora


def differences(lab, network):
    """As extracted from a finetune: biases, norms, modulation and whole weights beside the low-rank part."""
    lora = spelled(lab, network, "ComfyUI, lightx2v")
    for i, layer in enumerate(LAYERS):
        bias = network.get_submodule(layer).bias
        lora[f"diffusion_model.{layer}.diff_b"] = lab.draw(*bias.shape, seed=30 + i) * 0.1
    lora["diffusion_model.blocks.0.norm3.diff"] = lab.draw(256, seed=40) * 0.1
    lora["diffusion_model.blocks.0.norm3.diff_b"] = lab.draw(256, seed=41) * 0.1
    lora["diffusion_model.blocks.0.self_attn.norm_q.diff"] = lab.draw(256, seed=42) * 0.1
    lora["diffusion_model.blocks.1.self_attn.k.diff"] = lab.draw(256, 256, seed=43) * 0.02
    lora["diffusion_model.blocks.1.modulation.diff"] = lab.draw(1, 6, 256, seed=44) * 0.05
    lora["diffusion_model.head.head.diff_b"] = lab.draw(64, seed=45) * 0.1
    return lora


MAKERS = {"LoHa": loha, "LoKr": lokr, "LoKr, full": lambda *a: lokr(*a, low=False), "DoRA": dora, "diff": differences}


@pytest.fixture(scope="module")
def network(comfy, lab):
    return lab.load().model.diffusion_model


@pytest.fixture
def base(lab):
    def load(kind):
        model = lab.load()
        return model if kind == "float" else lab.quantize(model, kind)

    return load


@pytest.fixture
def report(lab, tmp_path, monkeypatch):
    """(text, MODEL with the LoRA) of the node on a file of these tensors."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))

    def run(model, lora, metadata=None, strength=1.0):
        save_file({k: v.contiguous() for k, v in lora.items()}, tmp_path / "mine.safetensors", metadata)
        out = lab.pack.nodes["TurboLoraReport"].execute(model, "mine.safetensors", strength)
        return out[0], out[1]

    return run


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_lora(comfy, lab, base, network, report, spelling):
    """Also where the host's own node matches nothing: the report says so and its model has the LoRA."""
    model = base("float")
    *_, alpha, by_host = SPELLINGS[spelling]
    lora = spelled(lab, network, spelling)
    stock = lab.merged(model, lora)
    assert len(stock.patches) == (len(LAYERS) if by_host else 0)
    text, patched = report(model, lora)
    assert f"{len(lora)} of {len(lora)} tensors act, on {len(LAYERS)} layers" in text
    assert f"{len(LAYERS)} x LoRA of rank {RANK} in float32" in text
    assert ("do not read for Wan" in text) != by_host
    lab.loaded(patched)
    for layer in LAYERS:
        first, second = factors(lab, layer, network)
        weight = lab.load().model.diffusion_model.get_submodule(layer).weight
        expected = weight + (ALPHA / RANK if alpha else 1.0) * (second @ first)
        torch.testing.assert_close(patched.model.diffusion_model.get_submodule(layer).weight, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", MAKERS)
def test_merged_lowvram_and_bypass_agree_and_come_off(comfy, lab, base, network, what, kind):
    model = base(kind)
    lora = MAKERS[what](lab, network)
    before, weights = lab.denoise(model), lab.weights(model)
    merged = lab.merged(model, lora)
    full = lab.denoise(merged)
    assert lab.distance(full, before) > 0.05
    assert torch.equal(lab.denoise(model), before) and lab.same(lab.weights(model), weights)

    comfy.model_management.unload_all_models()
    merged.patch_model(device_to=merged.load_device, lowvram_model_memory=1)
    low = merged.model.apply_model(**lab.inputs(), transformer_options={})
    merged.unpatch_model(merged.offload_device)
    assert lab.same(lab.weights(model), weights)

    bypass = lab.bypassed(model, lora)
    through = lab.denoise(bypass)
    assert torch.equal(lab.denoise(model), before) and lab.same(lab.weights(model), weights)
    print(f"{what}, {kind}: lowvram {lab.distance(low, full):.2g}, bypass {lab.distance(through, full):.2g}")
    assert lab.distance(low, full) < (1e-5 if kind == "float" else 0.03)
    if what == "DoRA" or kind == "row":
        assert lab.distance(through, full) > 0.04, "the host's bypass has learnt it: TurboLoraReport says otherwise"
    else:
        assert lab.distance(through, full) < (1e-5 if kind == "float" else 0.03)


@pytest.mark.parametrize("what", MAKERS)
def test_baked_in_before_quantizing(comfy, lab, base, network, what):
    """Before or after QuantizeW8A8: near each other, far from nothing; what is not a weight stays a patch."""
    lora = MAKERS[what](lab, network)
    model = base("float")
    patched = lab.merged(model, lora)
    float_ = lab.denoise(patched)
    for kind in ("block", "row"):
        before = lab.denoise(lab.quantize(patched, kind))
        after = lab.denoise(lab.merged(lab.quantize(model, kind), lora))
        print(f"{what}, {kind}: before {lab.distance(before, float_):.4f}, after {lab.distance(after, float_):.4f}")
        assert lab.distance(before, float_) < 0.05
        assert lab.distance(after, float_) < 0.06


def test_several_at_once(comfy, lab, base, network, report):
    """Three of different kinds stacked, by the host's nodes and ours; the order of sums does not matter."""
    model = base("block")
    weights = lab.weights(model)
    files = [spelled(lab, network, "diffusers"), lokr(lab, network), differences(lab, network)]

    def stack(order):
        result = model
        for i in order:
            result = report(result, files[i], strength=0.5)[1]
        return result

    out = lab.denoise(stack([0, 1, 2]))
    assert lab.distance(lab.denoise(stack([2, 0, 1])), out) < 0.02
    assert lab.distance(lab.denoise(stack([0, 1])), out) > 0.05
    before = lab.denoise(model)
    assert lab.distance(out, before) > 0.05 and lab.same(lab.weights(model), weights)
    assert torch.equal(lab.denoise(report(model, files[0], strength=0.0)[1]), before)


@pytest.mark.parametrize("kind", KINDS)
def test_another_strength_reloads_nothing(comfy, lab, base, network, monkeypatch, kind):
    """One network under all clones: no file is read, layers without a LoRA stay where they lie."""
    model = base(kind)
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


def test_report_of_what_is_left_out(lab, base, network, report):
    model = base("float")
    lora = spelled(lab, network, "kohya")
    pair = lambda name, rows=256, cols=256: {  # noqa: E731
        f"{name}.lora_down.weight": torch.zeros(RANK, cols),
        f"{name}.lora_up.weight": torch.zeros(rows, RANK),
    }
    lora |= pair("lora_te1_text_model_encoder_layers_0_self_attn_q_proj")
    lora |= pair("lora_unet_double_blocks_0_img_attn_qkv")
    lora |= pair("transformer.single_transformer_blocks.3.attn.to_q")
    lora |= pair("lora_unet_blocks_37_self_attn_q")
    lora |= pair("transformer.blocks.0.attn2.add_k_proj")
    lora |= pair("diffusion_model.blocks.0.self_attn.k", 1536, 1536)
    lora |= {"diffusion_model.blocks.0.self_attn.v.lora_up.weight": torch.zeros(256, RANK)}
    lora |= {"diffusion_model.blocks.0.something": torch.zeros(4)}
    text, patched = report(model, lora)
    print(text)
    assert len(patched.patches) == len(LAYERS)
    assert "12 of 26 tensors act, on 4 layers" in text and "that this model does not have" not in text
    for line in (
        "2 for a text encoder; Wan's umT5 takes none: lora_te1_text",
        "4 for Flux, Chroma or HunyuanVideo, not for Wan: lora_unet_double",
        "2 for a Wan with more blocks; this one has 2: lora_unet_blocks_37",
        "2 for the image branch of an I2V model, which this one does not have: transformer.blocks.0",
        "1 of a pair whose other half is missing: diffusion_model.blocks.0.self_attn.v",
        "1 of a kind that is unknown here: diffusion_model.blocks.0.something",
        "1 layers of another shape (another size of model?): blocks.0.self_attn.k.weight: expected [256, 256]",
    ):
        assert f"Left out, {line}" in text
    nothing, same_model = report(model, pair("lora_unet_double_blocks_0_img_attn_qkv"))
    assert "Nothing of it acts on this model." in nothing and not same_model.patches


@pytest.mark.parametrize("kind", ["block", "row"])
def test_report_on_int8(lab, base, network, report, kind):
    """The change against the rounding, in figures that scale with it; what bypass would leave out."""
    model = base(kind)
    strong = spelled(lab, network, "kohya")
    weak = {n: t * 1e-3 if "lora_up" in n else t for n, t in strong.items()}
    text = report(model, strong)[0]
    assert f"4 x LoRA of rank {RANK} in int8_{kind}" in text and "4 of the layers are int8" in text
    assert "That is little" not in text and "That is little" in report(model, weak)[0]
    assert ("would leave out 1 layers, ffn.2" in text) == (kind == "row")
    figure = float(text.split("change is ")[1].split(" times")[0])
    with_lora = report(model, strong)[1]
    lab.loaded(with_lora)
    layer = LAYERS[2]
    merged = with_lora.model.diffusion_model.get_submodule(layer).weight.dequantize()
    first, second = factors(lab, layer, network)
    change = ALPHA / RANK * (second @ first)
    rounding = merged - change - base(kind).model.diffusion_model.get_submodule(layer).weight.dequantize()
    assert 0.5 < figure / (change.norm() / rounding.norm()).item() < 2


def test_report_says_dora_and_alpha(lab, base, network, report):
    text = report(base("float"), dora(lab, network))[0]
    assert f"4 x DoRA of rank {RANK}" in text and "ignore the magnitudes" in text
    stated = {"transformer.r": 32, "transformer.lora_alpha": 64}
    text = report(base("float"), spelled(lab, network, "diffusers"), {"lora_adapter_metadata": json.dumps(stated)})[0]
    assert "alpha 64 at rank 32, which ComfyUI does not apply: strength 2" in text
    text, patched = report(base("float"), {"transformer.blocks.0.norm2.diff": torch.zeros(256)})
    assert list(patched.patches) == ["diffusion_model.blocks.0.norm3.weight"]
    text = report(base("float"), differences(lab, network))[0]
    for line in (
        "5 x difference of a bias in float32",
        "difference of a bias in norm",
        "1 x difference of a modulation",
    ):
        assert line in text


def test_few_step_lora_beside_our_schedule(comfy, lab, network, report):
    """A lightx2v-like file on a stock model: KSampler with turbo_rcm, TurboSampler, and the sigmas it was made for."""
    import nodes

    stock = lab.load(STOCK)
    patched = report(stock, differences(lab, network))[1]
    positive, latent = lab.positive(), lab.latent()
    for model in (patched, lab.quantize(patched), report(lab.quantize(stock), differences(lab, network))[1]):
        run = nodes.common_ksampler(model, 3, 4, 1.0, "lcm", "turbo_rcm", positive, positive, latent)[0]["samples"]
        assert run.isfinite().all()
        ours = lab.turbo(model, latent)  # the same to rounding, which int8 activations make larger
        assert lab.distance(ours, run) < (1e-4 if model is patched else 0.03)
    assert lab.distance(lab.turbo(stock, latent), lab.turbo(patched, latent)) > 0.05
    sampling = comfy.model_sampling.ModelSamplingDiscreteFlow()
    sampling.set_parameters(shift=5.0, multiplier=1000)
    theirs = comfy.samplers.calculate_sigmas(sampling, "simple", 4)
    torch.testing.assert_close(theirs, torch.tensor([1.0, 0.9375, 0.8333, 0.625, 0.0]), atol=1e-4, rtol=0)
    assert (lab.sigmas() - theirs).abs().max() < 0.02, "ours are near them"
    assert lab.turbo(patched, latent, sigmas=theirs).isfinite().all()


def test_report_on_another_model(comfy, lab, report):
    """What the host reads there acts; nothing is guessed from Wan's names."""
    model = flux(comfy)
    name = "transformer.single_transformer_blocks.0.attn.to_q"  # a slice of one matrix here
    lora = {f"{name}.lora_A.weight": lab.draw(RANK, 256), f"{name}.lora_B.weight": lab.draw(256, RANK)}
    lora |= {"transformer.blocks.0.attn1.to_q.lora_A.weight": lab.draw(RANK, 256)}
    text, patched = report(model, lora)
    assert "2 of 3 tensors act, on 1 layers" in text and len(patched.patches) == 1
    assert "1 of a pair whose other half is missing" in text
