"""The fused block in the host, on its torch reference: where it runs and where not, and that it changes only rounding.

No machine of these tests has kernels for it, so `fused` makes the pack believe that it pays.
"""

import functools
import importlib
import importlib.util

import pytest
import torch

from tests.helpers.lab import HIGH, PROJ_L, QUANT, STOCK, T2V

pytestmark = pytest.mark.newer

ROUNDING = 0.01  # of x0; int8 against floats is 0.02 to 0.1 of it


@pytest.fixture
def core(pack):
    return pack.part("turbo_core.wan.fused")


@pytest.fixture
def fused(core, monkeypatch):
    """fused(function): its result with the fused path open, and how many blocks took it."""

    def run(function):
        calls, block = [], core.block
        with monkeypatch.context() as patch:
            patch.setattr(core, "pays", lambda device: True)
            patch.setattr(core, "block", lambda *args, **given: calls.append(1) or block(*args, **given))
            return function(), len(calls)

    return run


def compare(lab, fused, model, **given):
    """x0 of the fused path and of the layers: how far apart; the number of fused blocks is checked to be both."""
    plain = lab.denoise(model, **given)
    ours, blocks = fused(lambda: lab.denoise(model, **given))
    figure = lab.distance(ours, plain)
    print(f"{figure:.1e} in {blocks} blocks")
    assert blocks == 2 and not torch.equal(ours, plain)
    return figure


@pytest.mark.parametrize("kind", ["block", "row"])
@pytest.mark.parametrize(
    ("name", "concat", "batch", "settings"),
    [
        (T2V, 0, 1, {}),  # trained SLA by default
        (T2V, 0, 2, {"topk": 0.4, "precision": "int8"}),
        (T2V, 0, 1, {"mode": "sparse only"}),
        (T2V, 0, 2, {"mode": "dense"}),
        (HIGH, 20, 1, {"topk": 0.5, "dense_blocks": "1"}),
        (STOCK, 0, 2, None),
        (STOCK, 0, 1, {"topk": 0.5}),  # training-free: through the host's attention call
    ],
)
def test_fused_is_the_host_s_block_up_to_rounding(lab, fused, kind, name, concat, batch, settings):
    model = lab.quantize(lab.load(name), kind)
    model = model if settings is None else lab.attention(model, **settings)
    assert compare(lab, fused, model, shape=(batch, *lab.shape[1:]), concat=concat) < ROUNDING


def test_who_writes_to_the_result_past_torchs_count_is_seen_by_the_next_block(lab, fused):
    model = lab.quantize(lab.load(STOCK))

    def through(change):
        def between(args, more):
            return {"img": change(more["original_block"](args)["img"])}

        patched = model.clone()
        patched.set_model_patch_replace(between, "dit", "double_block", 0)
        return fused(lambda: lab.denoise(patched))

    def by_data(x):
        x.data.mul_(3)
        return x

    (ours, blocks), (want, _) = through(by_data), through(lambda x: x * 3)
    assert blocks == 2 and torch.equal(ours, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(lab, fused, dtype):
    model = lab.quantize(lab.load(T2V, dtype))
    assert compare(lab, fused, model) < 2 * ROUNDING


def test_files_that_are_int8_already(lab, fused, tmp_path):
    assert compare(lab, fused, lab.load(QUANT)) < ROUNDING
    from turbo_core import checkpoint

    target = tmp_path / "stock.safetensors"
    checkpoint.quantize(lab.path(STOCK), target, "int8_block")
    assert compare(lab, fused, lab.load(target)) < ROUNDING


def test_timestep_of_each_frame(lab, fused):
    """As for a first frame that is given: five frames of 72 tokens, each with its own modulation."""
    given = lab.inputs()
    times = 1000 * torch.tensor([[0.0, 0.9, 0.9, 0.9, 0.9]])
    model = lab.quantize(lab.load(T2V))
    network = lab.loaded(model).diffusion_model
    plain = network(given["x"], times, given["c_crossattn"])
    ours, blocks = fused(lambda: network(given["x"], times, given["c_crossattn"]))
    assert blocks == 2 and 0 < lab.distance(ours, plain) < ROUNDING
    assert lab.distance(network(given["x"], times[:, -1], given["c_crossattn"]), plain) > 0.02


def identity(options):
    return options["x"]


def test_what_has_a_hand_in_between_goes_the_host_s_way(comfy, lab, fused):
    """Bit for bit what it was, block by block."""

    def bypassed(model):
        return lab.bypassed(model, lab.lora(model))

    def bypassed_projection(model):
        return lab.bypassed(model, lab.lora(model, PROJ_L))

    def weight_function(model):
        lab.loaded(model)  # the host's own loading takes away what it finds there
        model.model.diffusion_model.blocks[0].cross_attn.v.weight_function = [lambda weight: 2 * weight]
        return model

    def patched_forward(model):
        model = model.clone()
        forward = model.model.diffusion_model.blocks[0].self_attn.forward
        model.add_object_patch("diffusion_model.blocks.0.self_attn.forward", lambda *a, **kw: 2 * forward(*a, **kw))
        return model

    def hook(model):
        model.model.diffusion_model.blocks[0].ffn.register_forward_hook(lambda module, args, out: 2 * out)
        return model

    def attn1(model):
        model.model_options["transformer_options"]["patches"] = {"attn1_patch": [identity]}
        return model

    def attn2(model):
        model.model_options["transformer_options"]["patches"] = {"attn2_patch": [identity]}
        return model

    def float_layer(model):
        return lab.quantize(lab.load(T2V), layers="feed-forward")

    cases = [
        (bypassed, 1),
        (bypassed_projection, 1),
        (weight_function, 1),
        (patched_forward, 1),
        (hook, 1),
        (attn1, 0),
        (attn2, 0),
    ]
    for change, blocks in [*cases, (float_layer, 0)]:
        model = change(lab.quantize(lab.load(T2V)))
        plain = lab.denoise(model)
        ours, taken = fused(lambda: lab.denoise(model))  # noqa: B023
        print(change.__name__, taken)
        assert taken == blocks and lab.distance(ours, plain) < ROUNDING, change.__name__
        assert blocks or torch.equal(ours, plain)


def test_what_was_taken_off_again_leaves_the_blocks_fused(lab, fused, pack):
    """A bypass and a patched forward leave the module's own method in its dictionary when they go."""
    model = lab.quantize(lab.load(T2V))
    before, blocks = fused(lambda: lab.denoise(model))
    patched = model.clone()
    forward = model.model.diffusion_model.blocks[0].self_attn.forward
    patched.add_object_patch("diffusion_model.blocks.0.self_attn.forward", lambda *a, **kw: 2 * forward(*a, **kw))
    for changed in (lab.bypassed(model, lab.lora(model)), patched):
        _, with_it = fused(lambda: lab.denoise(changed))  # noqa: B023
        after, without = fused(lambda: lab.denoise(model))
        assert with_it == 1 and without == blocks == 2 and torch.equal(after, before)


def test_lora_in_the_weights_and_other_settings_stay_fused(comfy, lab, fused):
    """A LoRA that the host has put into the int8 weights needs nothing; block replacements and overrides neither."""
    model = lab.quantize(lab.load(T2V))
    plain = lab.denoise(model)
    patched = lab.merged(model, lab.lora(model))
    seen = []

    def replace(args, extra):
        seen.append("block")
        return extra["original_block"](args)

    def override(function, *args, **kwargs):
        seen.append("attention")
        return function(*args, **kwargs)

    patched.set_model_patch_replace(replace, "dit", "double_block", 1)
    patched = lab.dense(patched)
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    assert compare(lab, fused, patched) < ROUNDING
    assert seen.count("block") == 2 and seen.count("attention") == 2 * 4, "two evaluations, two attentions a block"
    assert lab.distance(lab.denoise(patched), lab.denoise(lab.dense(model))) > 0.01
    assert torch.equal(lab.denoise(model), plain)


@pytest.fixture
def given_stats(pack, monkeypatch):
    """For each block that ran: was its first norm given the row statistics that the block before had left?"""
    reference, seen = pack.part("turbo_core.int8.reference"), []
    norm = reference.layer_norm_quantize

    def watched(*args, stats=None, **kwargs):
        seen.append(stats is not None)
        return norm(*args, stats=stats, **kwargs)

    monkeypatch.setattr(reference, "layer_norm_quantize", watched)
    return lambda: seen[::3]


def test_row_statistics_reach_the_next_block_unless_something_lies_between(comfy, lab, fused, given_stats, monkeypatch):
    """In inference mode, as the host samples, where torch counts no writes to tensors that are made in it."""
    taken = 0

    def blocks(model):
        nonlocal taken
        with torch.inference_mode():
            _, ran = fused(lambda: lab.denoise(model))
        before, taken = taken, taken + ran
        return given_stats()[before:taken]

    def between(change):
        def patch(args):
            return args | {"img": change(args["img"])}

        model = lab.quantize(lab.load(T2V))
        model.model_options["transformer_options"]["patches"] = {"double_block": [patch]}
        return model

    assert blocks(lab.quantize(lab.load(T2V))) == [False, True]
    assert blocks(lab.quantize(lab.load(T2V), "row")) == [False, False]
    assert blocks(between(lambda x: x)) == [False, True]
    assert blocks(between(lambda x: x + 1)) == blocks(between(lambda x: x.add_(1))) == [False, False]
    bypassed = lab.quantize(lab.load(T2V))
    assert blocks(lab.bypassed(bypassed, lab.lora(bypassed))) == [False], "one block goes the host's way"
    prefetch = pytest.importorskip("comfy.model_prefetch")
    monkeypatch.setattr(prefetch, "pause_malloc_graph", None, raising=False)
    assert blocks(lab.quantize(lab.load(T2V))) == [False, True], "no such host"
    monkeypatch.setattr(prefetch, "pause_malloc_graph", object())
    assert blocks(lab.quantize(lab.load(T2V))) == [False, False]


def test_compiled_model_gives_the_same(lab, fused):
    """TorchCompileModel's wrapper: the compiler leaves the fused block alone, which is kernels from end to end."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = lab.quantize(lab.load(T2V))
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    options = {"sigmas": torch.tensor([0.9]), **compiled.model_options["transformer_options"]}
    options["wrappers"] = compiled.wrappers
    torch._dynamo.reset()
    plain, _ = fused(lambda: lab.denoise(model))
    run = lab.loaded(compiled).apply_model
    ours, blocks = fused(lambda: run(**lab.inputs(), transformer_options=options))
    assert blocks == 2 and torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert lab.distance(ours, plain) < 1e-4


def test_a_block_that_cannot_fuse_compiles_as_the_host_s_own(comfy, lab, core, pack, monkeypatch):
    """On a card, where attention is torch's: without a break in the graph, where the host's own has none."""
    module, attention = importlib.import_module("comfy.ldm.wan.model"), comfy.ldm.modules.attention.attention_pytorch
    monkeypatch.setattr(module, "optimized_attention", attention)
    monkeypatch.setattr(core, "pays", lambda device: True)
    model = lab.dense(lab.load(T2V))
    block, seen = lab.loaded(model).diffusion_model.blocks[0], []
    hook = block.register_forward_pre_hook(lambda module, *given: seen.append(given), with_kwargs=True)
    lab.denoise(model)
    hook.remove()
    args, kwargs = seen[0]
    torch._dynamo.reset()
    _, stock = pack.part("nodes.host.fused").FusedWanBlock.__mro__[:2]
    breaks = torch._dynamo.explain(functools.partial(stock.forward, block))(*args, **kwargs).graph_break_count
    compiled = torch.compile(block, backend="eager", fullgraph=not breaks)
    assert lab.distance(compiled(*args, **kwargs), block(*args, **kwargs)) < 1e-4


@pytest.mark.parametrize("kind", ["block", "row"])
def test_scales_in_half_precision_are_taken_as_they_are_by_the_layers(lab, fused, pack, kind, tmp_path):
    """As a file may have them."""
    import safetensors.torch

    checkpoint = pack.part("turbo_core.checkpoint")
    target = tmp_path / "half.safetensors"
    checkpoint.quantize(lab.path(T2V), target, f"int8_{kind}")
    sd = safetensors.torch.load_file(target)
    sd = {name: t.bfloat16() if name.endswith("weight_scale") else t for name, t in sd.items()}
    safetensors.torch.save_file(sd, target)
    assert compare(lab, fused, lab.load(target)) < ROUNDING


def test_a_host_without_one_of_the_model_classes_still_loads_the_pack(comfy, pack, monkeypatch):
    monkeypatch.delattr(comfy.supported_models, "WAN22_T2V")
    spec = importlib.util.find_spec(f"{pack.name}.nodes.host.loading")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(module.PLAIN) == 2 and None not in module.PLAIN


def test_sampling_end_to_end(lab, fused):
    model = lab.quantize(lab.load(T2V))
    plain = lab.turbo(model)
    ours, blocks = fused(lambda: lab.turbo(model))
    print(f"{lab.distance(ours, plain):.1e}")
    assert blocks == 4 * 2 and 0 < lab.distance(ours, plain) < 5 * ROUNDING


def test_an_interrupt_is_heard_between_layers(comfy, lab, pack, fused, monkeypatch):
    model, management = lab.quantize(lab.load(T2V)), comfy.model_management
    lab.loaded(model)
    network, given = model.model.diffusion_model, lab.inputs()
    reference, left = pack.part("turbo_core.int8.reference"), []
    residual = reference.int8_mm_residual

    def interrupting(*args, **kwargs):
        left.append(1)
        management.interrupt_current_processing()
        return residual(*args, **kwargs)

    monkeypatch.setattr(reference, "int8_mm_residual", interrupting)
    with pytest.raises(management.InterruptProcessingException):
        fused(lambda: network(given["x"], 1000 * given["t"], given["c_crossattn"]))
    management.interrupt_current_processing(False)
    assert len(left) == 1


def test_weights_that_are_fetched_do_not_overwrite_each_other(comfy, lab, fused, monkeypatch):
    """The host fetches offloaded layers into two buffers in turn: the third of q, k, v lands where the first was."""
    model = lab.quantize(lab.load(T2V))
    plain, blocks = fused(lambda: lab.denoise(model))
    cast, buffers, turns = comfy.ops.cast_bias_weight, {}, []

    def fetched(layer, *args, **kwargs):
        weight, bias, stream = cast(layer, *args, **kwargs)
        if not hasattr(weight, "_qdata"):
            return weight, bias, stream
        turns.append(layer)
        room = buffers.setdefault(len(turns) % 2, torch.empty(1 << 20, dtype=torch.int8))
        data = room[: weight._qdata.numel()].view_as(weight._qdata).copy_(weight._qdata)
        return type(weight)(data, weight._layout_cls, weight._params), bias, stream

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", fetched)
    ours, blocks = fused(lambda: lab.denoise(model))
    assert blocks == 2 and len(turns) == 2 * 10 and torch.equal(ours, plain)


@pytest.mark.parametrize("make", ["quantized", "loaded"])
def test_networks_with_blocks_of_their_own_keep_them(comfy, lab, pack, make):
    """Only the host's plain Wan network takes a block class; VACE and its like are built as they were."""
    module = pack.part("nodes.host.fused")
    model = lab.quantize(lab.load(STOCK)) if make == "quantized" else lab.load(QUANT)
    network = model.model.diffusion_model
    assert all(isinstance(block, module.FusedWanBlock) for block in network.blocks)
    assert all(hasattr(block.self_attn, "attn_op") == (make == "loaded") for block in network.blocks)
    assert "wan_attn_block_class" not in lab.load(STOCK).model.model_config.unet_config


def test_the_cpu_keeps_the_host_s_way(lab, core):
    assert not core.pays(torch.device("cpu"))
