"""TurboLoraReport: every spelling acts, and the report says what does, what does not, and what int8 does to it."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.lab import LINEAR, PROJ_L, STOCK, small_flux
from tests.helpers.lora_files import ALPHA, LAYERS, RANK, SPELLINGS, differences, dora, factors, lokr, spelled
from turbo_core import checkpoint

pytestmark = pytest.mark.newer


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
def test_every_spelling_is_the_same_lora(comfy, lab, network, report, spelling):
    """Also where the host's own node matches nothing: the report says so and its model has the LoRA."""
    model = lab.as_kind("float")
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


def test_factors_of_a_1x1_convolution_are_those_of_a_linear(comfy, lab, network, report):
    """As some tools write them, and as the host takes them."""
    model, lora = lab.as_kind("block"), spelled(lab, network, "diffusers")
    text, patched = report(model, lora)
    same, other = report(model, {k: v[..., None, None] if v.ndim == 2 else v for k, v in lora.items()})
    assert text == same and lab.same(lab.weights(patched), lab.weights(other))


def test_a_lora_that_was_trained_further_is_read_again(lab, report, tmp_path):
    node = lab.pack.nodes["TurboLoraReport"]
    report(lab.load(), lab.lora(lab.load(), LINEAR))
    before = node.fingerprint_inputs(lora_name="mine.safetensors", strength=1.0)
    assert node.fingerprint_inputs(lora_name="mine.safetensors") == before
    report(lab.load(), lab.lora(lab.load(), LINEAR, PROJ_L))
    assert node.fingerprint_inputs(lora_name="mine.safetensors") != before


def test_several_at_once(comfy, lab, network, report):
    """Three of different kinds stacked, by the host's nodes and ours; the order of sums does not matter."""
    model = lab.as_kind("block")
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


def test_report_of_what_is_left_out(lab, network, report):
    model = lab.as_kind("float")
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
def test_report_on_int8(lab, network, report, kind):
    """The change against the rounding, in figures that scale with it; in our blocks bypass leaves nothing out."""
    model = lab.as_kind(kind)
    strong = spelled(lab, network, "kohya")
    weak = {n: t * 1e-3 if "lora_up" in n else t for n, t in strong.items()}
    text = report(model, strong)[0]
    assert f"4 x LoRA of rank {RANK} in int8_{kind}" in text and "4 of the layers are int8" in text
    assert "That is little" not in text and "That is little" in report(model, weak)[0]
    assert "Bypass" not in text
    figure = float(text.split("change is ")[1].split(" times")[0])
    with_lora = report(model, strong)[1]
    lab.loaded(with_lora)
    layer = LAYERS[2]
    merged = with_lora.model.diffusion_model.get_submodule(layer).weight.dequantize()
    first, second = factors(lab, layer, network)
    change = ALPHA / RANK * (second @ first)
    rounding = merged - change - lab.as_kind(kind).model.diffusion_model.get_submodule(layer).weight.dequantize()
    assert 0.5 < figure / (change.norm() / rounding.norm()).item() < 2


@pytest.mark.parametrize("format", ["int8_row", "fp32"])
@pytest.mark.parametrize("ours", [False, True], ids=["the host's loader", "Turbo Loader"])
def test_report_of_what_bypass_does_to_the_host_s_own_blocks(comfy, lab, network, report, tmp_path, format, ours):
    """Its feed-forward part runs past the forward of ffn.2, or with what comes before the activation."""
    takes_activation = lab.pack.ops.takes_activation()
    checkpoint.convert(lab.path(STOCK), tmp_path / "stock.safetensors", format)
    path, options = str(tmp_path / "stock.safetensors"), {"dtype": torch.float32}
    by_host = lambda: comfy.sd.load_diffusion_model(path, model_options=options)  # noqa: E731
    model = lab.load(path, torch.float32) if ours else by_host()
    layer = "diffusion_model.blocks.0.ffn.2"
    lora = lab.lora(model, layer)
    text = report(model, lora)[0]
    apart = lab.distance(lab.denoise(lab.bypassed(model, lora)), lab.denoise(lab.merged(model, lora)))
    print(f"{apart:.2g}: {text}")
    wrong = not ours and (takes_activation or format == "int8_row")
    assert ("Bypass LoRA nodes" in text) == (apart > 0.04) == wrong
    assert ("would leave out 1 layers, ffn.2" in text) == (wrong and not takes_activation)


def test_report_says_dora_and_alpha(lab, network, report):
    text = report(lab.as_kind("float"), dora(lab, network))[0]
    assert f"4 x DoRA of rank {RANK}" in text and "ignore the magnitudes" in text
    stated = {"transformer.r": 32, "transformer.lora_alpha": 64}
    text = report(
        lab.as_kind("float"), spelled(lab, network, "diffusers"), {"lora_adapter_metadata": json.dumps(stated)}
    )[0]
    assert "alpha 64 at rank 32, which ComfyUI does not apply: strength 2" in text
    text, patched = report(lab.as_kind("float"), {"transformer.blocks.0.norm2.diff": torch.zeros(256)})
    assert list(patched.patches) == ["diffusion_model.blocks.0.norm3.weight"]
    text = report(lab.as_kind("float"), differences(lab, network))[0]
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
    model = small_flux(comfy)
    name = "transformer.single_transformer_blocks.0.attn.to_q"  # a slice of one matrix here
    lora = {f"{name}.lora_A.weight": lab.draw(RANK, 256), f"{name}.lora_B.weight": lab.draw(256, RANK)}
    lora |= {"transformer.blocks.0.attn1.to_q.lora_A.weight": lab.draw(RANK, 256)}
    text, patched = report(model, lora)
    assert "2 of 3 tensors act, on 1 layers" in text and len(patched.patches) == 1
    assert "1 of a pair whose other half is missing" in text
