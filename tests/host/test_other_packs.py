"""Other people's nodes on the same MODEL, by stand-ins that patch what theirs patch: docs/packs.md is the table.

Whichever comes first, the result is what the host's own model and that node give, or a line tells of it.
"""

import functools
import types

import pytest
import torch

from tests.helpers.lab import QUANT, STOCK, T2V

pytestmark = pytest.mark.newer
ROUNDING = 0.03  # of x0, where linears are int8
OVERRIDE = "optimized_attention_override"


@pytest.fixture
def packs(comfy, lab):
    """{name: function(MODEL) -> a clone that such a node has had in hand}."""
    attention = comfy.ldm.modules.attention

    def with_patches(part, forward):
        def patched(model):
            model = model.clone()
            for i, block in enumerate(model.get_model_object("diffusion_model").blocks):
                module = getattr(block, part)
                model.add_object_patch(f"diffusion_model.blocks.{i}.{part}.forward", types.MethodType(forward, module))
            return model

        return patched

    def guided(self, x, context, transformer_options={}, **kwargs):  # noqa: B006 (as such nodes have it)
        """Text attended to twice, and what sets the two apart made larger."""
        q, outs = self.norm_q(self.q(x)), []
        for text in (context, lab.context(seed=9) @ torch.ones(64, context.shape[2]) / 64):
            k, v = self.norm_k(self.k(text)), self.v(text)
            given = {"heads": self.num_heads, "transformer_options": transformer_options}
            outs.append(attention.optimized_attention(q, k, v, **given))
        return self.o(2 * outs[0] - outs[1])

    def enhanced(self, x, freqs, transformer_options={}):  # noqa: B006
        """Dense self-attention of its own, scaled."""
        import comfy.ldm.flux.math

        turn = lambda t: comfy.ldm.flux.math.apply_rope1(t.unflatten(-1, (self.num_heads, -1)), freqs)  # noqa: E731
        q, k = turn(self.norm_q(self.q(x))).flatten(2), turn(self.norm_k(self.k(x))).flatten(2)
        given = {"heads": self.num_heads, "transformer_options": transformer_options}
        return 1.5 * self.o(attention.optimized_attention(q, k, self.v(x), **given))

    def in_chunks(self, x):
        return torch.cat([torch.nn.Sequential.forward(self, part) for part in x.chunk(2, dim=1)], dim=1)

    def compiled(model):
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        model = model.clone()
        blocks = range(len(model.model.diffusion_model.blocks))
        set_torch_compile_wrapper(model, backend="eager", keys=[f"diffusion_model.blocks.{i}" for i in blocks])
        return model

    return {
        "guidance in cross-attention": with_patches("cross_attn", guided),
        "enhanced self-attention": with_patches("self_attn", enhanced),
        "feed-forward in chunks": with_patches("ffn", in_chunks),
        "torch.compile": compiled,
    }


NAMES = ["guidance in cross-attention", "enhanced self-attention", "feed-forward in chunks", "torch.compile"]


def evaluated(lab, model):
    """x0 of one evaluation with the wrappers of a MODEL, as its sampler has them."""
    given = lab.inputs()
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers, "sigmas": given["t"]}
    return lab.loaded(model).apply_model(**given, transformer_options=options)


@pytest.fixture
def fused(pack, monkeypatch):
    """fused(True): the fused path is open from now on."""
    core = pack.part("turbo_core.wan.fused")
    return lambda on: monkeypatch.setattr(core, "pays", lambda device: on)


@pytest.fixture
def told(lab, caplog):
    """told(words): what the log has said so far that holds these words."""
    lab.pack.settings.log_once.cache_clear()
    caplog.set_level("INFO")
    return lambda words: [r.getMessage() for r in caplog.records if words in r.getMessage()]


REPLACED = "trained linear branch does not run"


def cases(*models):
    """With every node; torch.compile, which takes its time, where blocks are fused: elsewhere other tests have it."""
    return [(name, *model) for model in models for name in NAMES if model[1] or name != "torch.compile"]


@pytest.mark.parametrize(("name", "kind", "way"), cases(("float", False), ("block", False), ("block", True)))
def test_dense_it_is_what_the_host_s_own_model_gives(lab, packs, fused, name, kind, way):
    fused(way)
    patch, stock = packs[name], lab.load(STOCK)
    expected = evaluated(lab, patch(stock))
    ours = lab.dense(lab.load(T2V))
    ours = patch(ours if kind == "float" else lab.quantize(ours, kind))
    found = evaluated(lab, ours)
    print(f"{name}, {kind}: {lab.distance(found, expected):.2g}")
    assert lab.distance(found, expected) < (1e-5 if kind == "float" else ROUNDING)
    if name in NAMES[:2]:
        assert lab.distance(expected, evaluated(lab, stock)) > 0.05


@pytest.mark.parametrize(("name", "model", "way"), cases((T2V, False), (QUANT, True), (STOCK, False)))
def test_the_order_makes_no_difference(lab, packs, fused, name, model, way):
    fused(way)
    patch, sparse = packs[name], functools.partial(lab.attention, topk=0.3)
    first, last = (evaluated(lab, m) for m in (sparse(patch(lab.load(model))), patch(sparse(lab.load(model)))))
    assert lab.distance(first, last) < (5e-3 if name == "torch.compile" else 1e-6)
    dense = evaluated(lab, patch(lab.dense(lab.load(model))))
    acts = lab.distance(first, dense) > 0.03
    assert acts == (name != "enhanced self-attention" or model == STOCK)  # for which see the next test


@pytest.mark.parametrize("name", [T2V, QUANT])
def test_whoever_replaces_trained_attention_is_named(lab, packs, told, name):
    patched = packs["enhanced self-attention"](lab.load(name))
    for _ in range(2):
        lab.turbo(patched, steps=1)
    lines = told(REPLACED)  # each run: the second may be another person's workflow
    assert len(lines) == 2 and all("enhanced" in line and "2 blocks from block 0" in line for line in lines)


@pytest.mark.parametrize("name", [T2V, STOCK])
def test_the_host_s_own_nag_does_nothing_on_wan(lab, name):
    """What docs/packs.md says of it: should a newer host ask for its patch, this fails and the page is to be mended."""
    from comfy_extras.nodes_nag import NAGuidance

    asked, guided = [], NAGuidance.execute(lab.load(name), 5.0, 0.5, 1.5)[0]
    patches = guided.model_options["transformer_options"]["patches"]["attn1_output_patch"]
    patches[0] = lambda out, extra, before=patches[0]: asked.append(1) or before(out, extra)
    assert torch.equal(evaluated(lab, guided), evaluated(lab, lab.load(name))) and not asked


@pytest.mark.parametrize("name", [n for n in NAMES if n != "enhanced self-attention"])
def test_nobody_else_is(lab, packs, told, name):
    lab.turbo(packs[name](lab.load(T2V)), steps=1)
    assert told(REPLACED) == []


@pytest.mark.parametrize("name", NAMES)
def test_before_quantizing_it_is_refused_with_a_cure(lab, packs, pack, name):
    with pytest.raises(pack.errors.TurboError, match="Put that node after QuantizeW8A8"):
        lab.quantize(packs[name](lab.load(STOCK)))


class BlockSparse:
    """As the host's own sparse attention node does it: on top again before every step, dense in the first of them."""

    def __init__(self, sigma_start):
        self.sigma_start, self.installed, self.calls = sigma_start, [], []

    def install(self, options):
        previous = options.get(OVERRIDE)
        if previous in self.installed:
            return

        def override(func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, **named):
            given = {"mask": mask, "attn_precision": attn_precision, "skip_reshape": skip_reshape, **named}
            own = q.shape == k.shape and float(named["transformer_options"]["sigmas"][0]) <= self.sigma_start
            self.calls.append(own)
            if own:
                return v.mean(1, keepdim=True).expand_as(q)
            return func(q, k, v, heads, **given) if previous is None else previous(func, q, k, v, heads, **given)

        self.installed.append(override)
        options[OVERRIDE] = override

    def patch(self, model):
        from comfy.patcher_extension import CallbacksMP

        model = model.clone()
        self.install(model.model_options["transformer_options"])
        prepare = lambda patcher, timestep, options, *_: self.install(options["transformer_options"])  # noqa: E731
        model.add_callback(CallbacksMP.ON_PREPARE_STATE, prepare)
        return model


@pytest.mark.parametrize("first", ["ours", "theirs"])
@pytest.mark.parametrize("name", [STOCK, T2V])
def test_the_host_s_own_sparse_attention_is_told_of(lab, told, first, name):
    """It wins on stock models, whichever comes first, and is told; TurboWan's attention is not asked for."""
    node, ours = BlockSparse(0.95), functools.partial(lab.attention, topk=0.3)
    model = lab.load(name)
    model = node.patch(ours(model)) if first == "ours" else ours(node.patch(model))
    found = lab.turbo(model, steps=2)
    if name == T2V:
        assert not any(node.calls) and told("acts on cross-attention alone")
        assert torch.equal(found, lab.turbo(ours(lab.load(name)), steps=2))
    else:
        assert any(node.calls) and told("has taken the place of Sparse Low-Bit Attention")
        assert told("passes attention on to it"), "in the first step"


def test_weights_that_another_loader_keeps_are_not_touched(lab, pack, tmp_path):
    """As a GGUF loader has them: bytes in a format of its own, and a state dict of sizes alone."""
    model = lab.load(STOCK)
    layer = model.model.diffusion_model.blocks[0].ffn[0]
    layer.weight = torch.nn.Parameter(torch.zeros(512, 272, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(pack.errors.TurboError, match="GGUF and the like"):
        lab.quantize(model, layers="feed-forward")
    layer._save_to_state_dict = lambda destination, prefix, keep: destination.update(
        {f"{prefix}weight": torch.zeros(512, 256, device="meta"), f"{prefix}temp.weight": torch.zeros(1, device="meta")}
    )
    with pytest.raises(pack.errors.TurboError, match="GGUF and the like"):
        pack.saving.save_model(model, str(tmp_path / "out.safetensors"))
    assert not list(tmp_path.iterdir())
