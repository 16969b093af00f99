"""The fused block against the block made of layers: on the torch reference, as a CPU without Triton computes them.

What separates the two is rounding: layers round a normed activation to their dtype before they round it to int8, and a
value on the edge between two int8 steps may fall on either side. The oracle of both is the model in float64.
"""

import functools
import math

import pytest
import torch

from tests.helpers.tensors import assert_close, gaussian, relative
from tests.helpers.wan import DIM, HEADS, exact_block, inputs, quantized, weights
from turbo_core import int8
from turbo_core.int8 import reference as int8_reference
from turbo_core.rope import rope_angles
from turbo_core.wan import Attention, WanModel, fused

FORMATS = [pytest.param(int8.quantize_block, id="block"), pytest.param(int8.quantize_rows, id="row")]
RAGGED = (3, 10, 18)  # latent: 3 * 5 * 9 = 135 tokens, a whole block of 128 and one of 7
EVEN = (2, 16, 16)  # 128 tokens: two samples fill whole blocks, attention may hand over int8


@pytest.fixture
def fuse(monkeypatch):
    """Run function() with the fused path on or off, whatever the machine has."""

    def run(function, on=True):
        with monkeypatch.context() as patched, torch.no_grad():
            patched.setattr(fused, "pays", lambda device: on)
            return function()

    return run


def one_block(quantize=int8.quantize_block, heads=HEADS, dtype=torch.float32, seed=0, **kind):
    sd = quantized(weights(layers=1, seed=seed, **kind), quantize)
    return WanModel.from_state_dict(sd, dtype, num_heads=heads).blocks[0]


def block_inputs(batch=1, grid=(3, 5, 9), heads=HEADS, dtype=torch.float32):
    """x, modulation, context and angles of a block; 3 * 5 * 9 = 135 tokens: a whole block of 128 and one of 7."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, math.prod(grid), DIM, generator=generator)
    modulation = 0.3 * torch.randn(batch, 6, DIM, generator=generator)
    context = torch.randn(batch, 7, DIM, generator=generator)
    return x.to(dtype), modulation, context.to(dtype), rope_angles(grid, DIM // heads)


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize(
    ("grid", "batch", "in_dim", "topk", "precision"),
    [
        (RAGGED, 1, 16, None, "bf16"),
        (RAGGED, 2, 36, 0.3, "bf16"),  # image-to-video; blocks of 128 run through samples
        (EVEN, 2, 16, 0.5, "int8"),
        ((1, 2, 2), 3, 16, 0.1, "bf16"),  # one token a sample
    ],
)
def test_fused_model_is_the_model_of_layers_up_to_rounding(fuse, quantize, grid, batch, in_dim, topk, precision):
    """1e-7 while no value changes its int8 step; one that does moves the rest, to 3.5e-3 of what 2e-2 is int8's own."""
    sd = weights(sla=True, in_dim=in_dim)
    x, t, context = inputs(batch, grid=grid)
    y = inputs(batch, in_dim - 16, grid, seed=5)[0] if in_dim > 16 else None
    exact = WanModel.from_state_dict(sd)(x, t, context, y, topk, precision)
    run = functools.partial(WanModel.from_state_dict(quantized(sd, quantize)), x, t, context, y, topk, precision)
    ours, theirs = fuse(run), fuse(run, on=False)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype and not torch.equal(ours, theirs)
    figures = relative(ours, theirs), relative(ours, exact), relative(theirs, exact)
    print("fused and layers {:.1e}, fused and floats {:.2%}, layers and floats {:.2%}".format(*figures))
    assert figures[0] < 6e-3 and figures[1] < 1.1 * figures[2]


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("topk", [None, 0.5])
def test_fused_bf16_model_is_no_further_from_floats(fuse, quantize, topk):
    sd, args = weights(sla=True), inputs(2, grid=RAGGED)
    exact = WanModel.from_state_dict(sd)(*args, topk=topk)
    run = functools.partial(WanModel.from_state_dict(quantized(sd, quantize), torch.bfloat16), *args, topk=topk)
    ours, theirs = relative(fuse(run), exact), relative(fuse(run, on=False), exact)
    print(f"fused {ours:.2%}, layers {theirs:.2%}")
    assert ours < 1.1 * theirs


@pytest.mark.parametrize("heads", [2, 4])  # of 128 and 64 channels
@pytest.mark.parametrize("quantize", FORMATS)
def test_one_block(fuse, quantize, heads):
    block, args = one_block(quantize, heads), block_inputs(2, heads=heads)
    assert_close(fuse(lambda: block(*args)), fuse(lambda: block(*args), on=False), 1e-3)


def floats(block):
    """The block's parameters in float64, int8 ones as what they stand for."""
    sd = block.state_dict()
    scales = {name: sd.pop(f"{name}_scale") for name in list(sd) if f"{name}_scale" in sd}
    return {name: (int8.dequantize(t, scales[name]) if name in scales else t).double() for name, t in sd.items()}


@pytest.mark.parametrize("quantize", FORMATS)
def test_modulation_of_each_frame(fuse, quantize):
    """A row of modulation for each frame of each sample, as models with a timestep a frame have it."""
    block, (x, _, context, angles) = one_block(quantize), block_inputs(2)
    frames = 0.5 * gaussian(6, 2 * 3, 1, DIM, seed=4)
    whole = frames.expand(-1, -1, 45, -1).reshape(6, 2, 135, DIM)  # 3 frames of 45 tokens
    ours = fuse(lambda: block.fused(x, [m.view(1, 6, DIM) for m in frames], context, angles))
    exact, other = (
        exact_block(floats(block), x.double(), context.double(), m.double(), (3, 5, 9))
        for m in (whole, whole.roll(1, 0))
    )
    assert_close(ours - x, exact - x, 0.02)
    assert relative(ours - x, other - x) > 0.2  # and it matters


def test_attention_hands_over_int8_only_where_its_blocks_are_those_of_the_product(fuse, monkeypatch):
    seen, attend = [], Attention.attend_self

    def spy(self, qkv, sums, quantized, **settings):
        seen.append(quantized)
        return attend(self, qkv, sums, quantized, **settings)

    monkeypatch.setattr(Attention, "attend_self", spy)
    even = (2, 8, 8)
    for quantize, batch, grid, heads in [
        (int8.quantize_block, 1, (3, 5, 9), 2),
        (int8.quantize_block, 2, even, 2),
        (int8.quantize_block, 2, (3, 5, 9), 2),  # a block of rows would hold tokens of two samples
        (int8.quantize_block, 1, even, 4),  # a block of columns holds two heads of 64
        (int8.quantize_rows, 1, even, 2),
    ]:
        block, args = one_block(quantize, heads), block_inputs(batch, grid, heads)
        fuse(functools.partial(block, *args, topk=0.5))
    assert seen == [True, True, False, False, False]


def test_only_where_it_pays_and_all_ten_are_int8_in_one_format(fuse, monkeypatch):
    calls, block = [], fused.block
    monkeypatch.setattr(fused, "block", lambda *args: calls.append(1) or block(*args))
    args, rows = block_inputs(), one_block(int8.quantize_rows)
    for change, on, used in [
        (None, True, 1),
        (None, False, 0),
        (torch.nn.Linear(DIM, DIM), True, 0),
        (rows.self_attn.k, True, 0),
    ]:
        layers = one_block()
        if change is not None:
            layers.self_attn.k = change
        calls.clear()
        fuse(functools.partial(layers, *args), on)
        assert len(calls) == used
    assert not fused.pays(torch.device("cpu")), "a CPU without the interpreter keeps the layers"


def test_gradients_flow_by_the_layers(monkeypatch):
    monkeypatch.setattr(fused, "pays", lambda device: True)
    block, (x, *rest) = one_block(), block_inputs()
    for learns in (x, block.norm3.weight):
        learns.requires_grad_()
        monkeypatch.setattr(fused, "block", lambda *_: pytest.fail("kernels have no gradient"))
        (gradient,) = torch.autograd.grad(block(x, *rest).square().sum(), learns)
        assert gradient.isfinite().all() and gradient.any()
        learns.requires_grad_(False)


@pytest.fixture
def given_stats(monkeypatch):
    """For each block that ran: was its first norm given the statistics of the block before?"""
    seen, norm = [], int8_reference.layer_norm_quantize

    def watched(*args, stats=None, **kwargs):
        seen.append(stats is not None)
        return norm(*args, stats=stats, **kwargs)

    monkeypatch.setattr(int8_reference, "layer_norm_quantize", watched)
    return lambda: seen[::3]


@pytest.mark.parametrize("inference", [True, False])
def test_row_statistics_reach_the_next_block(fuse, given_stats, inference):
    sd, args = weights(layers=3, sla=True), inputs(2, grid=RAGGED)
    for quantize, given in ((int8.quantize_block, [False, True, True]), (int8.quantize_rows, [False] * 3)):
        model = WanModel.from_state_dict(quantized(sd, quantize))
        before = len(given_stats())
        with torch.inference_mode(inference):
            model_out = fuse(lambda: model(*args, topk=0.5))  # noqa: B023
        assert given_stats()[before:] == given and model_out.isfinite().all()


def changed_within(x):
    x[:, 0] += 1
    return x


def changed_by_a_view(x):
    x.view(-1, DIM)[1].zero_()
    return x


@pytest.mark.parametrize("change", [changed_within, changed_by_a_view, lambda x: x * 2, torch.clone])
@pytest.mark.parametrize("inference", [True, False])
def test_row_statistics_are_of_what_the_next_block_is_given(fuse, given_stats, change, inference):
    first, second = one_block(), one_block(seed=1)
    x, *rest = block_inputs(2)
    with torch.inference_mode(inference):
        y = fuse(lambda: first(x, *rest))
        stats = int8_reference.row_stats(y.flatten(0, 1))
        assert torch.equal(fused._left_with(y), stats)
        fuse(lambda: second(y, *rest))
        y = change(y)
        fuse(lambda: second(y, *rest))
        assert given_stats() == [False, True, False]


@pytest.mark.parametrize(("quantize", "topk"), [(int8.quantize_block, 0.5), (int8.quantize_rows, None)])
def test_compiles_into_one_graph(fuse, quantize, topk):
    block, args = one_block(quantize, sla=True), block_inputs(2)
    eager = fuse(lambda: block(*args, topk=topk))
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert_close(fuse(lambda: compiled(*args, topk=topk)), eager, 1e-3)
