"""What newer hosts hand to linears, blocks, attention and patchers, taken on the host that is there."""

import inspect
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.lab import QUANT, STOCK, T2V

KINDS = ["float", "block", "row"]
ROUNDING = 0.01
LIMITS = "sigma_start", "sigma_end"
pytestmark = pytest.mark.newer


@pytest.fixture
def linears(pack):
    return pack.ops


def gelu(x):
    return F.gelu(x, approximate="tanh")


def down(lab, kind):
    """A layer of our own operations, ffn.2 of a block: [256, 512]."""
    model = lab.quantize(lab.load(), "block" if kind == "float" else kind, skip_blocks="1")
    return lab.loaded(model).diffusion_model.blocks[1 if kind == "float" else 0].ffn[2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_takes_an_activation_before_and_a_sum_after(comfy, lab, kind):
    layer = down(lab, kind)
    x, residual, gate = lab.draw(2, 150, 512), lab.draw(2, 150, 256, seed=1), lab.draw(256, seed=2)
    norm = comfy.ops.manual_cast.RMSNorm(512, eps=1e-6)
    norm.weight.copy_(lab.draw(512, seed=3))
    plain = {"gelu_tanh": layer(gelu(x)), "rms_norm": layer(norm(x)), None: layer(x)}
    assert lab.distance(plain["gelu_tanh"], plain[None]) > 0.1
    for act, expected in plain.items():
        assert lab.distance(layer(x, input_act=act, act_weight=norm), expected) < ROUNDING
        scaled = torch.addcmul(residual, expected, gate)
        assert lab.distance(layer(x, act, norm, residual, gate), scaled) < ROUNDING
        named = {"input_act": act, "act_weight": norm, "residual": residual, "residual_scale": gate}
        assert lab.distance(layer(x, **named), scaled) < ROUNDING


def test_what_a_signature_names_goes_to_the_host(pack, caplog):
    """One that nobody here knows as well, said once; one that the host lacks is computed around its forward."""

    class Newer:
        def forward(self, input, input_act=None, act_weight=None, residual=None, residual_scale=None, tomorrow=None):
            return input_act, residual, tomorrow

    class Older:
        def forward(self, input, *args, **kwargs):
            return 2 * input

    x, one = torch.randn(3, 4), torch.ones(3, 4)
    call = lambda layer, *given, **named: pack.ops.call_linear(  # noqa: E731
        layer.forward, pack.ops.names_in(layer.forward), *given, **named
    )
    newer, older = Newer(), Older()
    assert call(newer, x, "anything", residual=one) == ("anything", one, None)
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert call(newer, x, tomorrow=5) == (None, None, 5)
    assert len([r for r in caplog.records if "tomorrow" in r.getMessage()]) == 1
    assert torch.equal(call(older, x, "gelu_tanh"), 2 * gelu(x))
    torch.testing.assert_close(call(older, x, residual=one, residual_scale=3 * one), one + 6 * x)
    assert torch.equal(call(older, x, None, None, None, None), 2 * x)


def test_an_activation_that_nobody_knows_is_no_other_result(lab, pack):
    class Older:
        def forward(self, input, *args, **kwargs):
            return input

    with pytest.raises(pack.errors.TurboError, match="the activation 'tomorrow', which this ComfyUI lacks"):
        pack.ops.call_linear(Older().forward, frozenset(), torch.randn(3, 4), "tomorrow")


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_the_second_linear_see_what_comes_after_the_gelu(lab, kind):
    """As a bypass LoRA does, which computes from the input that it sees."""
    model = lab.as_kind(kind)
    plain, seen = lab.denoise(model), []
    block = model.model.diffusion_model.blocks[0]
    hooks = [
        block.ffn[0].register_forward_hook(lambda module, given, out: seen.append(gelu(out))),
        block.ffn[2].register_forward_pre_hook(lambda module, given: seen.append(given[0])),
    ]
    hooked = lab.denoise(model)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 2 and lab.distance(*seen) < 1e-6
    assert lab.distance(hooked, plain) < ROUNDING and torch.equal(lab.denoise(model), plain)


@pytest.mark.parametrize("part", ["block", "attention"])
def test_an_unknown_keyword_runs_the_host_s_own_forward(lab, monkeypatch, caplog, part):
    """With a line in the log; whether the host takes it is the host's affair."""
    block = lab.loaded(lab.load(QUANT)).diffusion_model.blocks[0]
    module = block if part == "block" else block.self_attn
    host, seen = type(module).__mro__[2 if part == "block" else 1], []
    monkeypatch.setattr(host, "forward", lambda self, *args, **kwargs: seen.append(kwargs))
    with caplog.at_level("INFO"):
        module(*([None] * (4 if part == "block" else 2)), next_year=1)
    assert seen == [{"next_year": 1}]
    assert len([r for r in caplog.records if "next_year" in r.getMessage()]) == 1


@pytest.fixture
def contained(comfy, lab):
    """(override of a stock MODEL, options of its first block, three containers with what they held)."""
    kind = comfy.ldm.modules.attention.AttentionTensorContainer

    def make(previous=None, tokens=(360, 360)):
        model = lab.load(STOCK).clone()
        if previous is not None:
            model.model_options["transformer_options"][lab.pack.override.OVERRIDE] = previous
        options = lab.attention(model, 0.3).model_options["transformer_options"]
        lengths = tokens[0], tokens[1], tokens[1]
        tensors = [lab.draw(1, n, 256, seed=i) for i, n in enumerate(lengths)]
        given = {"transformer_options": {**options, "block_index": 0}, "_inside_attn_wrapper": True}
        return options[lab.pack.override.OVERRIDE], given, [kind(t) for t in tensors], tensors

    return make


def test_q_k_and_v_are_given_up_before_they_are_attended(lab, contained, monkeypatch):
    override, given, containers, tensors = contained()
    expected = override(None, *tensors, 2, **given)
    given["transformer_options"].pop("turbowan_last_self_attention")
    real, held = lab.pack.settings.sparse_linear_attention, []

    def attend(*args, **kwargs):
        held.extend(container.tensor for container in containers)
        return real(*args, **kwargs)

    monkeypatch.setattr(lab.pack.settings, "sparse_linear_attention", attend)
    assert torch.equal(override.container_function(*containers, heads=2, **given), expected)
    assert held == [None] * 3


def test_containers_go_on_to_whoever_computes(comfy, lab, contained, monkeypatch):
    """Text has other lengths: the override before ours, by its own container_function or not, else the host."""
    text = (360, 24)
    override, given, containers, tensors = contained(tokens=text)
    dense = comfy.ldm.modules.attention.optimized_attention(*tensors, heads=2)
    assert lab.distance(override.container_function(*containers, heads=2, **given), dense) < 1e-5

    seen = []
    before = lambda func, *args, **kwargs: seen.append(args) or func(*args, **kwargs)  # noqa: E731
    override, given, containers, tensors = contained(before, text)
    assert lab.distance(override.container_function(*containers, heads=2, **given), dense) < 1e-5
    assert all(map(torch.equal, seen[0][:3], tensors)) and all(c.tensor is None for c in containers)

    before.container_function = lambda *args, **kwargs: args
    override, given, containers, _ = contained(before, text)
    assert override.container_function(*containers, heads=2, **given)[:3] == tuple(containers)
    assert all(c.tensor is not None for c in containers)


def sampled(lab, model, options=None):
    """One evaluation with the wrappers of a MODEL, as its sampler has them."""
    given = lab.inputs()
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers, **(options or {})}
    return lab.loaded(model).apply_model(**given, transformer_options={"sigmas": given["t"], **options})


class Preferred(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.config, self.calls = None, []

    def function(self, q, k, v, *args, **kwargs):
        self.calls.append(k.shape[1] if isinstance(k, torch.Tensor) else k.peek().shape[1])
        q, v = (t if isinstance(t, torch.Tensor) else t.take() for t in (q, v))
        return torch.zeros_like(q) + v.mean(1, keepdim=True)


def test_what_a_file_prefers_computes_where_ours_declines(comfy, lab):
    """The host drops a preference before it calls an override."""
    model = lab.attention(lab.load(STOCK), 0.3, dense_blocks="1")
    blocks, prefers = model.model.diffusion_model.blocks, {}
    plain = sampled(lab, model)
    for i, block in enumerate(blocks):
        for name in ("self_attn", "cross_attn"):
            prefers[i, name] = getattr(block, name).comfy_attention = Preferred()
    changed = sampled(lab, model)
    assert {at: preferred.calls for at, preferred in prefers.items()} == {
        (0, "self_attn"): [], (0, "cross_attn"): [24], (1, "self_attn"): [360], (1, "cross_attn"): [24],
    }  # fmt: skip
    assert lab.distance(changed, plain) > 0.01


def test_the_fused_block_honours_it(lab, pack, monkeypatch):
    core, call = pack.part("turbo_core.wan.fused"), pack.part("nodes.host.fused").attention_call
    monkeypatch.setattr(core, "pays", lambda device: True)
    model, preferred = lab.quantize(lab.load(STOCK)), Preferred()
    part = model.model.diffusion_model.blocks[0].cross_attn
    part.comfy_attention = preferred
    assert call(part, {}) == {"heads": 2, "transformer_options": {}, "preferred_attention": preferred}
    takes_preferences = hasattr(model.model.diffusion_model.blocks[1].self_attn, "comfy_attention")
    lab.denoise(model)
    assert preferred.calls == [24] * takes_preferences


@pytest.mark.parametrize("name", [T2V, STOCK])
@pytest.mark.parametrize("passes_on", [True, False])
def test_an_override_above_is_told_once(lab, caplog, name, passes_on):
    told = []
    settings = {n: value for n, value in lab.pack.settings.DEFAULTS.items() if n not in ("mode", *LIMITS)}
    model = lab.pack.override.with_settings(lab.load(name), "auto", 0, 1, told.append, **settings)
    options = model.model_options["transformer_options"]
    sampled(lab, model)
    assert told == []
    under = options.get(lab.pack.override.OVERRIDE)

    def enhance(func, *args, **kwargs):
        if passes_on and under is not None:
            return under(func, *args, **kwargs)
        return func(*args, **kwargs)

    options[lab.pack.override.OVERRIDE] = enhance
    for _ in range(2):
        sampled(lab, model)
    print(told)
    expected = "passes attention on to it" if passes_on else "whose settings have no effect"
    assert len(told) == 1 and "enhance" in told[0]
    assert ("cross-attention alone" if name == T2V else expected) in told[0]


def test_the_node_tells_it(lab, caplog, monkeypatch):
    shown = []
    monkeypatch.setattr(lab.pack.part("nodes.attention"), "show", lambda node, text: shown.append(text))
    model = lab.attention(lab.load(STOCK), 0.3)
    key = lab.pack.override.OVERRIDE
    model.model_options["transformer_options"][key] = lambda func, *args, **kwargs: func(*args, **kwargs)
    with caplog.at_level("INFO"):
        lab.turbo(model, steps=2)
    assert len(shown) == 1 and [shown[0] in r.getMessage() for r in caplog.records].count(True) == 1


def test_a_second_node_takes_the_place_of_the_first(lab, sparse_calls):
    """One override and one wrapper of ours, however often the settings are set."""
    model = lab.load(STOCK)
    for topk in (0.9, 0.6, 0.3):
        model = lab.attention(model, topk)
    once = lab.attention(lab.load(STOCK), 0.3)
    sparse_calls.clear()
    assert torch.equal(sampled(lab, model), sampled(lab, once)) and sparse_calls == [360] * 4
    assert model.model_options["transformer_options"][lab.pack.override.OVERRIDE].turbowan_previous is None
    assert sum(map(len, model.wrappers["apply_model"].values())) == 1


class Counted:
    """sigmas of one evaluation that count how often they are read."""

    def __init__(self, sigma):
        self.sigma, self.reads = sigma, 0

    def max(self):
        self.reads += 1
        return torch.tensor(self.sigma)


@pytest.mark.parametrize("name", [T2V, STOCK])
def test_sigma_is_read_before_the_first_block(lab, name):
    """What the host may record of a block has no wait for the device in it."""
    model = lab.attention(lab.load(name), 0.3, start_percent=0.1)
    reads, sigmas = [], Counted(0.5)
    block = model.model.diffusion_model.blocks[0]
    hook = block.register_forward_pre_hook(lambda *_: reads.append(sigmas.reads))
    sampled(lab, model, {"sigmas": sigmas})
    assert reads == [1] and sigmas.reads == 1
    unlimited = lab.attention(model, 0.3)
    sampled(lab, unlimited, {"sigmas": sigmas})
    hook.remove()
    assert sigmas.reads == 1


@pytest.mark.parametrize("switch", ["off", "on", None])
def test_the_environment_leaves_the_compiler_out(comfy, lab, monkeypatch, switch):
    """As long as a MODEL of ours is sampled; a host without one is left alone."""
    args, option = comfy.cli_args.args, "disable_comfy_compiler"
    monkeypatch.setattr(args, option, False, raising=False)
    if switch is not None:
        monkeypatch.setenv("TURBOWAN_COMPILER", switch)
    model, seen = lab.attention(lab.load(), 0.3), []
    model.set_model_unet_function_wrapper(
        lambda apply, given: (
            seen.append(getattr(args, option)) or apply(given["input"], given["timestep"], **given["c"])
        )
    )
    lab.turbo(model, steps=2)
    assert seen == [switch == "off"] * 2 and getattr(args, option) is False
    assert sum(map(len, model.wrappers["outer_sample"].values())) == 1
    monkeypatch.delattr(args, option)
    assert "outer_sample" not in lab.load().wrappers


def test_probes_are_outside_of_the_graph(comfy, lab, pack, monkeypatch):
    """TurboCompare's look at blocks; where the host has no compiler, nothing happens."""
    inside, depths = [], []

    class Pause:
        def __enter__(self):
            inside.append(1)
            depths.append(len(inside))

        def __exit__(self, *_):
            inside.pop()

    prefetch = pytest.importorskip("comfy.model_prefetch")
    monkeypatch.setattr(prefetch, "pause_malloc_graph", Pause, raising=False)
    run = pack.part("nodes.reports.compare_run").run_both
    model, sigmas = lab.load(), lab.sigmas(1)
    *_, trial = run(model, lab.attention(model, 0.3), lab.positive(), lab.latent(), 3, sigmas, True, 64)
    assert len(trial.errors) == 2 and len(depths) == 2 + 2 * 2 and set(depths) == {1}
    monkeypatch.delattr(prefetch, "pause_malloc_graph")
    with pack.part("nodes.host.kernels").outside_graph():
        pass


def test_weights_made_in_the_graph_are_read_from_no_disk(comfy, lab, monkeypatch):
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "fast_disk", True, raising=False)
    model = lab.load()
    model.fast_disk = True
    quantized = lab.quantize(model)
    assert quantized.fast_disk is False and model.fast_disk is True


@pytest.mark.parametrize("answer", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_the_host_is_asked_whether_weights_lie_on_a_fast_disk(comfy, lab, monkeypatch, answer, dynamic):
    """Of the tensors as we loaded them; hosts whose patchers do not take the answer are not asked."""
    kind, asked = comfy.model_patcher.ModelPatcher, []
    begin = kind.__init__

    def takes(self, model, load_device, offload_device, size=0, weight_inplace_update=False, fast_disk=None):
        begin(self, model, load_device, offload_device, size, weight_inplace_update)
        self.fast_disk = fast_disk

    monkeypatch.setattr(kind, "__init__", takes)
    monkeypatch.setattr(kind, "fast_disk", None, raising=False)
    storage = types.ModuleType("comfy.storage")
    storage.state_dict_fast_disk = lambda sd: asked.append(set(sd)) or answer
    monkeypatch.setitem(sys.modules, "comfy.storage", storage)
    model = lab.pack.loading.load_turbo_model(lab.path(T2V), disable_dynamic=not dynamic)
    assert model.fast_disk is answer and len(asked) == 1 and "blocks.0.ffn.0.weight" in asked[0]
    monkeypatch.setattr(kind, "__init__", begin)
    assert "fast_disk" in inspect.signature(begin).parameters or lab.load().fast_disk is None


def test_formats_that_the_device_cannot_multiply_are_passed_on(comfy, lab, monkeypatch):
    asked = []
    monkeypatch.setattr(
        comfy.ops,
        "get_disabled_quant_formats",
        lambda device: asked.append(device) or {"int8_tensorwise"},
        raising=False,
    )
    model = lab.quantize(lab.load(), "row", skip_blocks="1")
    assert model.model.diffusion_model.blocks[0].ffn[2]._full_precision_mm
    assert set(asked) == {comfy.model_management.get_torch_device()}


def test_the_shim_is_what_it_says(comfy, lab, request):
    """With --newer the calls are newer ones; without it they are all what this host has by itself."""
    part = lab.load(STOCK).model.diffusion_model.blocks[0].self_attn
    takes_activation = lab.pack.ops.takes_activation()
    assert takes_activation or not request.config.getoption("--newer", False)
    assert takes_activation == hasattr(part, "comfy_attention") == hasattr(comfy.ops, "get_disabled_quant_formats")
