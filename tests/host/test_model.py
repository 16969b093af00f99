"""Our MODEL against the host's own network and against the standalone one, beside another copy, and compiled."""

import pytest
import torch

from tests.helpers.comfyui import load_pack
from tests.helpers.lab import HIGH, QUANT, STOCK, T2V
from turbo_core import checkpoint
from turbo_core.wan import WanModel

pytestmark = pytest.mark.newer


@pytest.fixture(scope="module")
def stock(comfy, lab, tmp_path_factory):
    """The host's own loader on a conversion of one of the tiny files."""

    def load(name, kind="fp32"):
        target = tmp_path_factory.mktemp("stock") / f"{kind}.safetensors"
        checkpoint.convert(lab.path(name), target, kind)
        return comfy.sd.load_diffusion_model(str(target))

    return load


# 360 tokens: ragged query and key blocks; 128: one whole query block; 30: less than a key block; odd sides are padded
@pytest.mark.parametrize("shape", [(2, 16, 5, 16, 18), (1, 16, 2, 16, 16), (1, 16, 1, 10, 12), (1, 16, 3, 7, 9)])
def test_dense_model_equals_stock_loader(lab, stock, shape):
    ours, theirs = lab.dense(lab.load()), stock(T2V)
    a, b = lab.denoise(ours, shape=shape), lab.denoise(theirs, shape=shape)
    print("dense", shape, lab.difference(a, b))
    assert lab.difference(a, b) < 1e-5


def test_dense_image_model_equals_stock_loader(lab, stock):
    ours, theirs = lab.dense(lab.load(HIGH)), stock(HIGH)
    a, b = (lab.denoise(m, shape=(2, *lab.shape[1:]), concat=20) for m in (ours, theirs))
    print("dense i2v", lab.difference(a, b))
    assert lab.difference(a, b) < 1e-5


def test_dense_row_quantized_equals_stock_loader(lab, stock):
    ours = lab.dense(lab.quantize(lab.load(), "row"))
    a, b = lab.denoise(ours), lab.denoise(stock(T2V, "int8_row"))
    print("dense row", lab.difference(a, b))
    assert lab.difference(a, b) < 1e-5


def standalone(path, topk, given, dtype=torch.float32, precision="bf16"):
    network = WanModel.from_state_dict(checkpoint.load(path)[0], dtype)
    y = given.get("c_concat")
    sigma = given["t"].view(-1, 1, 1, 1, 1)
    v = network(given["x"], 1000 * given["t"], given["c_crossattn"], y=y, topk=topk, precision=precision)
    return given["x"] - sigma * v


# batch 2 once: one sample's blocks must not leak into the other's
@pytest.mark.parametrize(
    ("name", "concat", "topk", "batch"), [(T2V, 0, 0.0, 1), (T2V, 0, 0.3, 2), (T2V, 0, 1.0, 1), (HIGH, 20, 0.5, 1)]
)
def test_sla_equals_standalone(lab, name, concat, topk, batch):
    model = lab.attention(lab.load(name), topk)
    given = {"shape": (batch, *lab.shape[1:]), "concat": concat}
    a = lab.denoise(model, **given)
    b = standalone(lab.path(name), topk, lab.inputs(**given))
    print("sla", name, topk, lab.difference(a, b))
    assert lab.difference(a, b) < 1e-4


@pytest.fixture
def same_time_embedding(monkeypatch):
    """The host computes the angles of the time embedding in float32, which is 6e-6 off, and W8A8 of a network of
    random weights makes 1e-2 of that: values beside a rounding edge fall on different sides, layer by layer.
    """
    import comfy.ldm.wan.model

    from turbo_core.wan import timestep_embedding

    swapped = lambda dim, position: timestep_embedding(position, dim)  # noqa: E731
    monkeypatch.setattr(comfy.ldm.wan.model, "sinusoidal_embedding_1d", swapped)


@pytest.mark.parametrize(("name", "concat", "kind"), [(T2V, 0, "block"), (T2V, 0, "row"), (HIGH, 20, "block")])
def test_quantized_sla_equals_standalone(lab, same_time_embedding, tmp_path, name, concat, kind):
    path = lab.path(name.replace(".pth", "-quant.pth"))
    if kind == "row":
        path = str(tmp_path / "row.safetensors")
        checkpoint.convert(lab.path(name), path, "int8_row")
    model = lab.attention(lab.load(path))
    a = lab.denoise(model, concat=concat)
    b = standalone(path, 0.3, lab.inputs(concat=concat))
    unquantized = lab.denoise(lab.attention(lab.load(name)), concat=concat)
    print("quantized sla", name, kind, lab.distance(a, b), "quantization itself", lab.distance(a, unquantized))
    assert lab.distance(a, b) < 1e-2
    assert lab.distance(a, unquantized) > 2e-3, "nothing was quantized"


@pytest.mark.parametrize(("name", "concat"), [(T2V, 0), (HIGH, 20)])
def test_quantized_sla_in_the_host_as_it_is(lab, name, concat):
    """With the host's own float32 timestep angles, 6e-6 off, which int8 rounding in random weights amplifies."""
    path = lab.path(name.replace(".pth", "-quant.pth"))
    ours = lab.denoise(lab.attention(lab.load(path)), concat=concat)
    distance = lab.distance(ours, standalone(path, 0.3, lab.inputs(concat=concat)))
    print("quantized sla, host as it is", name, distance)
    assert distance < 2e-2


@pytest.mark.parametrize("name", [T2V, QUANT])
def test_bf16_stays_near(lab, name):
    """The type that a card computes in. proj_l stays float32."""
    model = lab.attention(lab.load(name, torch.bfloat16))
    model.set_model_compute_dtype(torch.bfloat16)
    assert model.model.get_dtype() == torch.bfloat16
    proj_l = model.model.diffusion_model.blocks[0].self_attn.attn_op["local_attn"]["proj_l"]
    assert proj_l.weight.dtype == torch.float32
    a, b = lab.denoise(model), lab.denoise(lab.attention(lab.load()))
    print("bf16", name, lab.distance(a, b))
    assert 1e-3 < lab.distance(a, b) < 0.05


def test_low_bit_attention_equals_standalone(lab):
    model = lab.attention(lab.load(), 0.3, "int8")
    a, b = lab.denoise(model), standalone(lab.path(T2V), 0.3, lab.inputs(), precision="int8")
    print("int8 attention", lab.distance(a, b))
    assert lab.distance(a, b) < 1e-3


def test_projection_is_felt(lab):
    """sparse only differs from auto: proj_l is loaded and used."""
    model = lab.load()
    with_branch, without = (lab.denoise(lab.attention(model, mode=mode)) for mode in ("auto", "sparse only"))
    assert lab.difference(with_branch, without) > 1e-3


def test_loaded_model_is_sla_without_a_node(lab):
    """A TurboWan file attends as it was trained, top-k 0.1, also when nobody adds the attention node."""
    model = lab.load()
    assert torch.equal(lab.denoise(model), lab.denoise(lab.attention(model, 0.1)))


def test_stock_model_is_dense_without_a_node(comfy, lab):
    ours = lab.load(STOCK)
    theirs = comfy.sd.load_diffusion_model(lab.path(STOCK))
    assert torch.equal(lab.denoise(ours), lab.denoise(theirs))


def test_two_copies_of_the_pack_side_by_side(lab, tmp_path):
    """Someone has the pack twice in custom_nodes: models of either copy run, quantize, save and load in the other."""
    import asyncio
    import importlib
    import shutil

    root = lab.pack.root
    copy = tmp_path / "second"
    copy.mkdir()
    shutil.copy(root / "__init__.py", copy)
    for part in ("nodes", "turbo_core", "kernels"):
        shutil.copytree(root / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    second = load_pack(copy, "custom_nodes_second_TurboWan")
    nodes = asyncio.run(asyncio.run(second.comfy_entrypoint()).get_node_list())
    nodes = {node.GET_SCHEMA().node_id: node for node in nodes}
    loader = importlib.import_module("custom_nodes_second_TurboWan.nodes.host.loading")

    first = lab.quantize(lab.load())
    expected = lab.denoise(first)
    other = nodes["QuantizeW8A8"].execute(loader.load_turbo_model(lab.path(T2V)), "block (TurboWan)")[0]
    assert torch.equal(lab.denoise(other), expected)
    # the nodes of one on the models of the other
    assert torch.equal(lab.denoise(nodes["SparseLowBitAttention"].execute(first, 0.1, "bf16")[0]), expected)
    assert torch.equal(lab.denoise(lab.attention(other, 0.1)), expected)
    both = nodes["QuantizeW8A8"].execute(first, "block (TurboWan)")[0]
    assert torch.equal(lab.denoise(both), expected)
    assert torch.equal(lab.turbo(both), lab.turbo(other))
    # files of one, loaded by the other; LoRA merging goes through the layout that was registered last
    for network, load in ((first, loader.load_turbo_model), (other, lab.load)):
        path = tmp_path / "saved.safetensors"
        lab.pack.saving.save_model(network, str(path))
        assert lab.distance(lab.denoise(load(str(path))), expected) < 5e-3
    changed = [lab.denoise(lab.merged(m, lab.lora(m))) for m in (first, other)]
    assert torch.equal(*changed) and not torch.equal(changed[0], expected)
    assert torch.equal(lab.denoise(first), expected)


def test_compiled_model_gives_the_same(lab):
    """TorchCompileModel's wrapper; the eager backend, because inductor takes a minute here."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = lab.attention(lab.load(), 0.3)
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    options = {"sigmas": torch.tensor([0.9]), **compiled.model_options["transformer_options"]}
    options["wrappers"] = compiled.wrappers
    out = lab.loaded(compiled).apply_model(**lab.inputs(), transformer_options=options)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert lab.difference(out, lab.denoise(model)) < 1e-5


def test_settings_change_a_compiled_model_from_step_to_step_and_from_run_to_run(lab):
    """TorchCompileModel has torch guard nothing that comes from transformer_options: what is read there is frozen."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    network = lab.load()

    def denoised(sigma, compiled, **settings):
        model = lab.attention(network, **settings)
        if compiled:
            set_torch_compile_wrapper(model, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
        options = {"sigmas": torch.tensor([sigma]), **model.model_options["transformer_options"]}
        options["wrappers"] = model.wrappers
        return lab.loaded(model).apply_model(**lab.inputs(sigma=sigma), transformer_options=options)

    dense_first = {"topk": 0.3, "start_percent": 0.3}
    for sigma, settings in ((0.99, dense_first), (0.6, dense_first), (0.6, {"topk": 0.6}), (0.6, {"mode": "dense"})):
        found, expected = (denoised(sigma, compiled, **settings) for compiled in (True, False))
        assert lab.distance(found, expected) < 1e-5, (sigma, settings)


@pytest.mark.parametrize("kind", ["block", "row"])
def test_nodes_that_merge_models_read_what_an_int8_model_stores(comfy, lab, kind):
    """The host's merging nodes ask a MODEL for every key of its state dict."""
    model = lab.quantize(lab.load(), kind)
    patches = model.get_key_patches("diffusion_model.")
    name = "diffusion_model.blocks.0.ffn.0.weight_scale"
    assert name in patches and torch.equal(patches[name][0][0], model.model.state_dict()[name])
    assert not hasattr(lab.load().model.diffusion_model.blocks[0].ffn[0], "weight_scale")


@pytest.mark.parametrize("kind", ["quantized", "loaded"])
def test_a_lora_hook_on_int8_weights_is_told_before_the_run(comfy, lab, kind):
    model = lab.quantize(lab.load()) if kind == "quantized" else lab.load(QUANT)
    hooks = comfy.hooks.create_hook_lora(lab.lora(model), 1.0, 0.0)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    with pytest.raises(ValueError, match=r"by a hook .* cannot change int8 weights.*unquantized file"):
        model.register_all_hook_patches(hooks, target)
