"""What the host sets aside for a run with fused blocks: what these take, counted, and nothing else's."""

import contextlib

import pytest
import torch

from tests.helpers import allocating
from tests.helpers.lab import HIGH, PROJ_L, QUANT, STOCK, T2V
from tests.helpers.live_bytes import LiveBytes

pytestmark = pytest.mark.newer
WITHIN = 0.1
LENT = [tuple(f"self_attn.{n}" for n in "qkv"), ("cross_attn.k", "cross_attn.v")]
LENT += [(name,) for name in ("self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")]
CLIP = (1, 16, 9, 48, 48)  # 5,184 tokens


@pytest.fixture
def kernels(comfy, pack, monkeypatch):
    """A card whose kernels compute, as far as memory goes, and whose attention keeps no scores."""
    core, blocks = pack.part("turbo_core.wan.fused"), pack.part("nodes.host.blocks")
    monkeypatch.setattr(core, "pays", lambda device: True)
    monkeypatch.setattr(core, "operations", lambda device, *_: allocating.OPERATIONS)
    monkeypatch.setattr(blocks, "sla_from_qkv", lambda *given: allocating.attention(*given[:-1]))
    flash = lambda q, k, v, heads, **named: torch.empty_like(q)  # noqa: E731
    monkeypatch.setattr(pack.part("nodes.host.fused"), "optimized_attention", flash)
    monkeypatch.setattr(pack.part("nodes.host.fused"), "token_slices", lambda x: [slice(0, 128)])
    monkeypatch.setattr(comfy.model_management, "pytorch_attention_flash_attention", lambda: True)


def counted(lab, model, concat=0):
    """Bytes at the peak of one evaluation, latents included, weights not."""
    given = lab.inputs(shape=CLIP, concat=concat)
    options, network = {**model.model_options["transformer_options"], "sigmas": given["t"]}, lab.loaded(model)
    # under inference_mode an operation made of others would be seen as one, without what it allocates inside
    with torch.inference_mode(False), torch.no_grad(), LiveBytes() as count:
        network.apply_model(**{k: v.clone() for k, v in given.items()}, transformer_options=options)
    return count.peak


def asked(comfy, model, monkeypatch):
    """(bytes that the host wants free at least for a run of one sample, its factor after that)."""
    asked = []
    with monkeypatch.context() as patch:
        load = lambda models, **named: asked.append(named["minimum_memory_required"])  # noqa: E731
        patch.setattr(comfy.model_management, "load_models_gpu", load)
        options = comfy.model_patcher.create_model_options_clone(model.model_options)
        comfy.sampler_helpers.prepare_model_patcher(model, {"positive": []}, options)
        comfy.sampler_helpers.prepare_sampling(model, CLIP, {"positive": []}, options)
    return asked[0]


@pytest.mark.parametrize("kind", ["block", "row"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [(T2V, None), (T2V, {"precision": "int8"}), (T2V, {"mode": "dense"}), (HIGH, None), (STOCK, None)],
)
def test_the_estimate_is_what_is_counted(comfy, lab, kernels, monkeypatch, name, settings, kind):
    model = lab.quantize(lab.load(name), kind)
    model = model if settings is None else lab.attention(model, 0.1, **settings)
    before = model.model.memory_usage_factor
    found, estimate = counted(lab, model, 20 if name == HIGH else 0), asked(comfy, model, monkeypatch)
    print(f"{name} {kind} {settings}: {found / 1e6:.1f} MB, {estimate / found - 1:+.1%}")
    assert abs(estimate / found - 1) < WITHIN
    assert model.model.memory_usage_factor == before, "the host's own, for whoever shares the network"


@pytest.mark.parametrize(("dim", "inner"), [(1536, 8960), (5120, 13824)])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "int8", None])
def test_at_the_published_sizes_by_shape(pack, monkeypatch, dim, inner, rows, precision):
    """Of 1.3B and 14B in bf16, 32,768 tokens: in some the feed-forward part is the worst moment of the block."""
    fake, tokens = pytest.importorskip("torch._subclasses.fake_tensor").FakeTensorMode(), 32768
    core, heads = pack.part("turbo_core.wan.fused"), dim // 128
    monkeypatch.setattr(core, "operations", lambda device, *_: allocating.OPERATIONS)
    sizes = {"ffn.0": (inner, dim), "ffn.2": (dim, inner)}

    def borrow(*names):
        scale = lambda n, k: torch.empty(n, 1) if rows else torch.empty(-(-n // 128), -(-k // 128))  # noqa: E731
        shapes = [sizes.get(name, (dim, dim)) for name in names]
        return contextlib.nullcontext([(torch.empty(*s, dtype=torch.int8), scale(*s), None) for s in shapes])

    def attend(qkv, sums, quantized):
        if precision is None:
            return torch.empty_like(qkv[0])
        return allocating.attention(qkv.unflatten(-1, (heads, 128)), sums, precision, quantized)

    lent = lambda *names: weights[names]  # noqa: E731
    attend_text = lambda q, project: torch.empty_like(q)  # noqa: E731
    with fake, torch.no_grad():
        # in the order of its channels, as a convolution leaves it to the first block
        x = torch.empty(1, dim, tokens, dtype=torch.bfloat16).transpose(1, 2)
        context = torch.empty(1, 512, dim, dtype=torch.bfloat16)
        modulation, norm3 = [torch.empty(1, dim)] * 6, (torch.empty(dim), torch.empty(dim))
        weights = {names: borrow(*names) for names in LENT}  # made before: the host counts them apart
        with LiveBytes() as count:
            core.block(x, context, modulation, lent, attend, attend_text, norm3, heads, 1e-6)
    quantized = precision is not None and not rows
    estimate = pack.part("nodes.reports.memory").block_bytes(dim, inner, 2, precision, rows, quantized)
    found = (x.nbytes + count.peak) / tokens
    print(f"{dim} rows={rows} {precision}: {found / dim:.2f} bytes an element, {estimate / found - 1:+.1%}")
    assert abs(estimate / found - 1) < WITHIN


def by_host(comfy, model, monkeypatch):
    """Bytes of the host's own estimate."""
    with monkeypatch.context() as patch:
        patch.setattr(model, "wrappers", {})
        return asked(comfy, model, monkeypatch)


@pytest.mark.parametrize(
    "what", ["a LoRA", "a bypass LoRA", "a patch", "an override", "a wish", "a hook on a block", "a factor of a node"]
)
def test_what_may_send_a_block_the_host_s_way_keeps_the_host_s_estimate(comfy, lab, kernels, pack, monkeypatch, what):
    model = pack.part("nodes.reports.memory").tell_memory(lab.load(QUANT))
    assert asked(comfy, model, monkeypatch) < 0.9 * by_host(comfy, model, monkeypatch)
    if what == "a LoRA":
        model = lab.merged(model, lab.lora(model))
    elif what == "a bypass LoRA":
        model = lab.bypassed(model, lab.lora(model, PROJ_L))
    elif what == "a patch":
        model.set_model_patch(lambda given: given["x"], "attn1_patch")
    elif what == "an override":
        options = model.model_options["transformer_options"]
        options["optimized_attention_override"] = lambda func, *given, **named: func(*given, **named)
    elif what == "a wish":
        wish = torch.nn.Module()
        wish.function = torch.nn.functional.scaled_dot_product_attention
        model.model.diffusion_model.blocks[1].self_attn.comfy_attention = wish
    elif what == "a factor of a node":
        model.model.memory_usage_factor *= 0.5
    else:
        block = model.model.diffusion_model.blocks[1]
        model.add_object_patch("diffusion_model.blocks.1.ffn.forward", block.ffn.forward)
    assert asked(comfy, model, monkeypatch) == by_host(comfy, model, monkeypatch)


def test_no_kernels_or_scores_that_are_kept_and_the_estimate_is_the_host_s(comfy, lab, kernels, pack, monkeypatch):
    model = pack.part("nodes.reports.memory").tell_memory(lab.load(QUANT))
    monkeypatch.setattr(pack.part("turbo_core.wan.fused"), "pays", lambda device: False)
    assert asked(comfy, model, monkeypatch) == by_host(comfy, model, monkeypatch)
    monkeypatch.setattr(pack.part("turbo_core.wan.fused"), "pays", lambda device: True)
    monkeypatch.setattr(comfy.model_management, "pytorch_attention_flash_attention", lambda: False)
    assert asked(comfy, model, monkeypatch) == by_host(comfy, model, monkeypatch)
