"""QuantizeW8A8 and SparseLowBitAttention on every kind of Wan model that the host knows, at dim 256."""

import importlib
import json

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.tiny_dits import random_weight
from turbo_core.wan import QUANTIZED_LINEARS

SIZES = {"dim": 256, "ffn_dim": 512, "num_heads": 2, "num_layers": 2, "text_dim": 64}
FRAMES, HEIGHT, WIDTH = 5, 16, 18  # of the latent: 360 tokens, three query blocks, six key blocks, both ragged


def _clip(lab, tokens=257):
    return {"clip_fea": lab.draw(1, tokens, 1280, seed=11)}


def _clip_and(name, *shape):
    return lambda lab: {**_clip(lab), name: lab.draw(*shape, seed=12)}


def _one(name, *shape):
    return lambda lab: {name: lab.draw(*shape, seed=12)}


def _vace(lab):
    return {"vace_context": lab.draw(1, 2, 96, FRAMES, HEIGHT, WIDTH, seed=12), "vace_strength": [1.0, 0.5]}


# name: (class in comfy.ldm.wan, its arguments beside SIZES, what apply_model is given beside latent and text)
VARIANTS = {
    "T2V": ("model.WanModel", {"in_dim": 16}, lambda lab: {}),
    "I2V 2.2": ("model.WanModel", {"in_dim": 36}, lambda lab: {}),
    "TI2V 5B": ("model.WanModel", {"in_dim": 48, "out_dim": 48}, lambda lab: {}),
    "I2V 2.1": ("model.WanModel", {"model_type": "i2v", "in_dim": 36}, _clip),
    "FLF2V": (
        "model.WanModel",
        {"model_type": "i2v", "in_dim": 36, "flf_pos_embed_token_number": 514},
        lambda lab: _clip(lab, 514),
    ),
    "Fun Control 1.1": (
        "model.WanModel",
        {"model_type": "i2v", "in_dim": 48, "in_dim_ref_conv": 16},
        _clip_and("reference_latent", 1, 16, HEIGHT, WIDTH),
    ),
    "Fun Control 2.2": (
        "model.WanModel",
        {"in_dim": 52, "in_dim_ref_conv": 16},
        _one("reference_latent", 1, 16, HEIGHT, WIDTH),
    ),
    "VACE": ("model.VaceWanModel", {"vace_layers": 2, "vace_in_dim": 96}, _vace),
    "Camera 2.1": (
        "model.CameraWanModel",
        {"model_type": "camera", "in_dim": 32},
        _clip_and("camera_conditions", 1, 24, FRAMES, HEIGHT * 8, WIDTH * 8),
    ),
    "Camera 2.2": (
        "model.CameraWanModel",
        {"model_type": "camera_2.2", "in_dim": 36},
        _one("camera_conditions", 1, 24, FRAMES, HEIGHT * 8, WIDTH * 8),
    ),
    "Animate": (
        "model_animate.AnimateWanModel",
        {"in_dim": 36, "num_layers": 5},  # a face adapter for each five blocks
        _clip_and("pose_latents", 1, 16, FRAMES - 1, HEIGHT, WIDTH),
    ),
    "Animate-2": (
        "model_animate2.WanAnimate2Model",
        {"model_type": "animate2", "in_dim": 36},
        _clip_and("pose_latents", 1, 16, FRAMES - 1, HEIGHT, WIDTH),
    ),
    "S2V": ("model.WanModel_S2V", {}, _one("audio_embed", 1, 25, 1024, 20)),
    "HuMo": ("model.HumoWanModel", {"in_dim": 36}, _one("audio_embed", 1, FRAMES, 8, 5, 1280)),
    "SCAIL": ("model.SCAILWanModel", {"model_type": "i2v", "in_dim": 20}, _clip),
    "Causal AR": ("ar_model.CausalWanModel", {"in_dim": 16}, lambda lab: {}),
    "SCAIL-2": ("model.SCAIL2WanModel", {"model_type": "i2v", "in_dim": 20}, _clip),
    "WanDancer": ("model_wandancer.WanDancerModel", {"in_dim": 36}, _one("audio_embed", 1, 17, 35)),
}


# what the weights alone do not tell, so that such files say it in their metadata
STATED = {"Animate-2": {"model_type": "animate2"}, "Causal AR": {"causal_ar": True}}


@pytest.fixture(scope="module")
def state(comfy, lab):
    """Random weights of a variant, as bf16, such that every block moves its input."""
    made = {}

    def make(name):
        if name in made:
            return made[name]
        path, arguments, _ = VARIANTS[name]
        module, cls = path.split(".")
        cls = getattr(importlib.import_module(f"comfy.ldm.wan.{module}"), cls)
        ops = comfy.ops.disable_weight_init
        with torch.device("meta"):
            network = cls(**{**SIZES, **arguments}, device="meta", dtype=torch.float32, operations=ops)
        made[name] = {}
        for seed, (key, tensor) in enumerate(network.state_dict().items()):
            random = torch.Generator().manual_seed(seed)
            made[name][key] = random_weight(key, tensor.shape, random, SIZES["dim"]).bfloat16()
        return made[name]

    return make


@pytest.fixture
def stock(lab, state, tmp_path):
    """A variant through TurboLoader from a file as people have it."""

    def load(name, dtype=torch.bfloat16):
        config = {"num_heads": SIZES["num_heads"], "text_dim": SIZES["text_dim"]}
        config = json.dumps({"transformer": config | STATED.get(name, {})})
        path = tmp_path / f"{name}.safetensors"
        save_file({k: v.to(dtype) for k, v in state(name).items()}, path, {"config": config})
        return lab.load(path)

    return load


def evaluate(lab, model, name, sigma=0.9):
    """Prediction of one evaluation, with what this variant takes beside the text."""
    arguments = VARIANTS[name][1]
    channels = arguments.get("out_dim", 16)
    given = lab.inputs((1, channels, FRAMES, HEIGHT, WIDTH), sigma, concat=arguments.get("in_dim", 16) - channels)
    options = {**model.model_options["transformer_options"], "sigmas": given["t"]}
    extra = VARIANTS[name][2](lab)
    return lab.loaded(model).apply_model(**given, **extra, transformer_options=options)


def with_lora(lab, model, scale=0.3):
    """A LoRA on layers that every variant has."""
    layers = "diffusion_model.blocks.0.ffn.0", "diffusion_model.blocks.1.self_attn.v"
    return lab.merged(model, lab.lora(model, *layers, scale=scale))


@pytest.mark.parametrize("name", VARIANTS)
def test_quantized_variant(comfy, lab, stock, tmp_path, name):
    model = stock(name)
    dense = evaluate(lab, model, name)
    assert dense.isfinite().all()
    for kind in ("block", "row"):
        quantized = lab.quantize(model, kind)
        out, weights = evaluate(lab, quantized, name), lab.weights(quantized)
        before = evaluate(lab, lab.quantize(with_lora(lab, model), kind), name)
        after = evaluate(lab, with_lora(lab, quantized), name)
        path = str(tmp_path / f"{kind}.safetensors")
        lab.pack.saving.save_model(quantized, path)
        again = lab.load(path)
        error, lora = lab.distance(out, dense), lab.distance(before, out)
        order = lab.distance(after, before)
        print(f"{name}, {kind}: error {error:.4f}, a LoRA {lora:.3f}, before or after {order:.4f}")
        assert 2e-3 < error < 0.03
        assert lora > 0.05 and order < 0.03
        int8 = {key.removesuffix(".weight") for key, tensor in weights.items() if tensor.dtype == torch.int8}
        assert int8 == expected_layers(name)
        assert type(again.model) is type(model.model)
        guarded = {
            type(m).__name__ for m in quantized.model.diffusion_model.modules() if "FeedForward" in type(m).__name__
        }
        assert "WanFeedForward" not in guarded  # a bypass LoRA must see what comes after the GELU
        assert lab.same(lab.weights(again), weights)
    assert torch.equal(evaluate(lab, model, name), dense), "the source is as it was"


def expected_layers(name):
    blocks = [f"blocks.{i}" for i in range(VARIANTS[name][1].get("num_layers", 2))]
    blocks += ["vace_blocks.0", "vace_blocks.1"] if name == "VACE" else []
    return {f"{block}.{layer}" for block in blocks for layer in QUANTIZED_LINEARS}


@pytest.mark.parametrize("name", VARIANTS)
def test_sparse_variant(lab, stock, sparse_calls, name):
    """Self-attention, all of it and nothing else, goes through the sparse path; keeping every block changes nothing."""
    model = stock(name)
    dense = evaluate(lab, model, name)
    all_kept = evaluate(lab, lab.attention(model, 1.0), name)
    tokens = sparse_calls[:]
    sparse = evaluate(lab, lab.attention(lab.quantize(model), 0.5, "int8"), name)
    print(f"{name}: tokens {tokens}, top-k 0.5 in int8 {lab.distance(sparse, dense):.4f}")
    # VACE attends in its own blocks too, for each of the two contexts; Animate-2 in the branch of the pose only
    assert len(tokens) == {"VACE": 6, "Animate": 5}.get(name, 2)
    assert set(tokens) == {{"Fun Control 1.1": 432, "Fun Control 2.2": 432, "Animate-2": 288}.get(name, 360)}
    assert lab.distance(all_kept, dense) < 1e-5
    assert sparse.isfinite().all() and 0.01 < lab.distance(sparse, dense) < 0.2


STORED = {
    "fp16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8 scaled": "float8_e4m3fn",
    "int8 rows": "int8_tensorwise",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
}
LAYOUTS = {
    "float8_e4m3fn": "TensorCoreFP8E4M3Layout",
    "int8_tensorwise": "TensorWiseINT8Layout",
    "mxfp8": "TensorCoreMXFP8Layout",
    "nvfp4": "TensorCoreNVFP4Layout",
}


def stored_as(state, how):
    """The T2V variant with the linears of its blocks stored in another format."""
    from comfy_kitchen.tensor import QuantizedTensor

    result = dict(state("T2V"))
    for name in [n for n in result if n.startswith("blocks.") and n.endswith(".weight") and result[n].ndim == 2]:
        if isinstance(how, torch.dtype):
            result[name] = result[name].to(how)
            continue
        quantized = QuantizedTensor.from_float(result[name].float(), LAYOUTS[how], scale="recalculate")
        result |= quantized.state_dict(name)
        entry = json.dumps({"format": how}).encode()
        result[name.removesuffix("weight") + "comfy_quant"] = torch.tensor(list(entry), dtype=torch.uint8)
    return result


@pytest.mark.parametrize(
    ("name", "kept"), [*((name, False) for name in STORED), ("fp8_e4m3fn", True), ("fp8_e5m2", True)]
)
def test_quantizing_every_stored_format(comfy, lab, state, tmp_path, name, kept):
    """Through the host's own loader. kept: fp8 stays fp8 in memory, as on a card that computes in it."""
    config = {"num_heads": SIZES["num_heads"], "text_dim": SIZES["text_dim"]}
    path = tmp_path / "model.safetensors"
    save_file(stored_as(state, STORED[name]), path, {"config": json.dumps({"transformer": config})})
    options = {"dtype": getattr(torch, name.replace("fp8", "float8"))} if kept else {}
    model = comfy.sd.load_diffusion_model(str(path), model_options=options)
    if kept:
        assert model.model.diffusion_model.blocks[0].ffn[0].weight.dtype == options["dtype"]
    before = evaluate(lab, model, "T2V")
    for kind in ("block", "row"):
        quantized = lab.quantize(with_lora(lab, model, scale=0.01), kind)
        error = lab.distance(evaluate(lab, quantized, "T2V"), before)
        print(f"{name}, {kind}: {error:.4f}")
        assert 2e-3 < error < 0.03
    sparse = lab.distance(evaluate(lab, lab.attention(model, 0.5), "T2V"), before)
    assert 0.01 < sparse < 0.2


def test_weights_that_only_their_loader_reads_are_refused(comfy, lab, stock):
    """GGUF packs keep bytes: no float can be made of them here."""
    model = stock("T2V")
    layer = model.model.diffusion_model.blocks[0].ffn[0]
    layer.weight = torch.nn.Parameter(torch.zeros(512, 144, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"blocks.0.*uint8.*GGUF.*bf16"):
        lab.quantize(model)


def test_scale_of_the_input_goes_into_the_weight(comfy, lab, state, tmp_path):
    """Files of ModelOpt (AWQ) multiply the input of a layer: int8 layers do not."""
    sd = stored_as(state, "float8_e4m3fn")
    scale = 0.5 + lab.draw(256).abs()
    for i in range(2):
        sd[f"blocks.{i}.ffn.0.pre_quant_scale"] = scale.clone()
    path = tmp_path / "model.safetensors"
    save_file(sd, path, {"config": json.dumps({"transformer": {"num_heads": 2, "text_dim": 64}})})
    model = comfy.sd.load_diffusion_model(str(path))
    before = evaluate(lab, model, "T2V")
    for kind in ("block", "row"):
        assert lab.distance(evaluate(lab, lab.quantize(model, kind), "T2V"), before) < 0.03


@pytest.mark.parametrize("kind", ["float", "block", "row"])
def test_sampling_with_everything_on(lab, stock, kind):
    """KSampler's way through I2V 2.1: image and CLIP features from the conditioning, sparse attention, int8."""
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    class Vision:
        penultimate_hidden_states = lab.draw(1, 257, 1280, seed=5)

    model = stock("I2V 2.1")
    model = model if kind == "float" else lab.quantize(model, kind)
    image = lab.draw(1, 16, FRAMES, HEIGHT, WIDTH, seed=4)
    mask = torch.ones(1, 1, FRAMES, HEIGHT, WIDTH)
    extra = {"concat_latent_image": image, "concat_mask": mask, "clip_vision_output": Vision}
    positive, negative = lab.positive(**extra), lab.positive(9, **extra)
    sampler = lab.comfy.samplers.sampler_object("euler")

    def sample(model):
        sigmas = lab.comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 2)
        out = SamplerCustom.execute(model, True, 1, 3.0, positive, negative, sampler, sigmas, lab.latent())
        return out[0]["samples"]

    dense, sparse = sample(model), sample(lab.attention(model, 0.5, "int8"))
    assert dense.isfinite().all() and sparse.isfinite().all()
    assert 1e-3 < lab.distance(sparse, dense) < 0.3


def test_autoregressive_sampling(lab, stock):
    """Its own way hands no options to the blocks: int8 layers act there, the attention node does not."""
    model = stock("Causal AR")

    def evaluate_blocks(model):
        network = lab.loaded(model).diffusion_model
        caches = network.init_kv_caches(1, 360, "cpu", torch.float32), network.init_crossattn_caches(1, "cpu", None)
        state = {"start_frame": 0, "kv_caches": caches[0], "crossattn_caches": caches[1]}
        given = lab.inputs()
        options = {**model.model_options["transformer_options"], "sigmas": given["t"], "ar_state": state}
        return model.model.apply_model(**given, transformer_options=options)

    dense = evaluate_blocks(model)
    assert torch.equal(evaluate_blocks(lab.attention(model, 0.5)), dense)
    assert 2e-3 < lab.distance(evaluate_blocks(lab.quantize(model)), dense) < 0.03


def test_pattern_on_wan(lab, stock):
    """All of the blocks, the image branch too; proj_l is of a fixed type and stays."""

    def int8(model, pattern):
        weights = lab.weights(lab.quantize(model, pattern=pattern))
        return {name.removesuffix(".weight") for name, tensor in weights.items() if tensor.dtype == torch.int8}

    image_branch = {f"blocks.{i}.cross_attn.{name}" for i in range(2) for name in ("k_img", "v_img")}
    assert int8(stock("I2V 2.1"), "blocks.*") == expected_layers("I2V 2.1") | image_branch
    assert int8(lab.load(), "blocks.*, -blocks.0.*") == {n for n in expected_layers("T2V") if n.startswith("blocks.1.")}
    with pytest.raises(ValueError, match="in place of layers and skip_blocks"):
        lab.quantize(lab.load(), pattern="blocks.*", skip_blocks="0")
