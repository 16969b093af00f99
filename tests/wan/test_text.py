"""A text whose padding is one key, with keys and values made once: the same model, held to float64 and to 512 keys."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.tensors import relative
from tests.helpers.wan import TEXT, exact_wan, inputs, quantized, weights
from turbo_core import int8
from turbo_core.wan import Text, WanModel, fused
from turbo_core.wan.text import collapsed, shares


def padded(*lengths, total=512):
    """Contexts of so many tokens, padded with zeros as the text encoder does it."""
    rows = [torch.randn(n, TEXT, generator=torch.Generator().manual_seed(n)) for n in lengths]
    return torch.stack([F.pad(row, (0, 0, 0, total - len(row))) for row in rows])


@pytest.mark.parametrize("lengths", [(7,), (200,), (3, 50)])
def test_a_text_is_the_equations_over_512_keys(lengths):
    sd = weights()
    (x, t, _), context = inputs(len(lengths)), padded(*lengths)
    out = WanModel.from_state_dict(sd)(x, t, Text(context))
    exact = exact_wan(sd, x, t, context)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=2e-5)
    few, _ = collapsed(context, torch.float32)
    assert few.shape[1] < 300 and relative(exact_wan(sd, x, t, few), exact) > 1e-3, "the weight of the padding matters"


FORMATS = [None, int8.quantize_block, int8.quantize_rows]


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("lengths", [(20,), (128,), (3, 150)])
@pytest.mark.parametrize("on", [False, True])
def test_its_keys_and_values_are_those_of_512_tokens(quantize, lengths, on, monkeypatch):
    """In int8 blocks the padding beside a prompt is not the padding behind it, and samples share no block."""
    monkeypatch.setattr(fused, "pays", lambda device: on)
    sd = weights(layers=1)
    model = WanModel.from_state_dict(quantized(sd, quantize) if quantize else sd)
    (x, t, _), context = inputs(len(lengths)), padded(*lengths)
    every = []
    model(x, t, text := Text(context))
    model.blocks[0](torch.ones(len(lengths), 1, 256), torch.zeros(len(lengths), 6, 256), model.text_embedding(context),
                    torch.zeros(1, 64), kept=every)  # fmt: skip
    [[few]] = text.of(model, torch.float32)[2]
    for ours, theirs in zip(few, every[0]):
        n = ours.shape[1] - 1
        assert n < 400 and relative(ours[:, :n], theirs[:, :n]) < 1e-6
        assert relative(ours[:, n:].expand_as(theirs[:, n:]), theirs[:, n:]) < 1e-6


@pytest.mark.parametrize("quantize", FORMATS)
@pytest.mark.parametrize("on", [False, True])
def test_steps_share_it_and_see_what_512_keys_show(quantize, on, monkeypatch):
    """Up to rounding, which moves a value by an int8 step now and then."""
    monkeypatch.setattr(fused, "pays", lambda device: on)
    sd = weights(sla=True)
    model = WanModel.from_state_dict(quantized(sd, quantize) if quantize else sd)
    (x, t, _), context, calls = inputs(), padded(20), []
    text = Text(context)
    model.blocks[1].cross_attn.norm_k.register_forward_hook(lambda *_: calls.append(1))
    for step in range(3):
        different = relative(model(x + step, t, text, topk=0.5), model(x + step, t, context, topk=0.5))
        assert different < (6e-3 if quantize else 2e-6)
    assert len(calls) == 1 + 3  # once for the Text, at each step for the tensor


def test_in_bfloat16_the_padding_keeps_its_weight():
    """One key with the rounded logarithm weighs up to 1.5 % too much or too little."""
    for count in (3, 65, 100, 387, 505):
        for dtype in (torch.bfloat16, torch.float16):
            biases = torch.tensor(shares(count, dtype), dtype=dtype).double()
            assert abs(biases.exp().sum() / count - 1) < 5e-4
    assert shares(7, torch.float32)[0] == pytest.approx(math.log(7), abs=1e-6)
    sd, (x, t, _), context = weights(), inputs(), padded(20)
    model = WanModel.from_state_dict(sd, torch.bfloat16)
    exact = exact_wan(sd, x, t, context)
    assert relative(model(x, t, Text(context)), exact) < 1.1 * relative(model(x, t, context), exact)


def test_other_weights_are_other_keys():
    (x, t, _), text = inputs(), Text(padded(20))
    one, other = (WanModel.from_state_dict(weights(seed=seed)) for seed in (0, 1))
    run = functools.partial(lambda model: model(x, t, text))
    wanted = run(other)
    run(one)
    assert torch.equal(run(other), wanted)
    run(one)
    one.load_state_dict(other.state_dict())  # in its place, as a hand-over does it
    assert not torch.equal(run(one), wanted)
    one.edition += 1
    assert torch.equal(run(one), wanted)


def test_what_cannot_shrink_stays():
    for context in (torch.randn(1, 512, 4), torch.randn(1, 7, 4), padded(505), torch.full((1, 16, 4), torch.nan)):
        assert collapsed(context, torch.float32)[1] is None
    few, bias = collapsed(torch.zeros(1, 512, 4), torch.float32)  # no prompt at all
    assert few.shape == (1, 8, 4) and bias.exp().sum().item() == pytest.approx(512, rel=1e-6)
