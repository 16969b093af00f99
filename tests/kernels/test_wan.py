"""A whole model of turbo_core by the kernels, against the same in torch."""

import functools

import pytest
import torch

from tests.helpers.tensors import assert_close, gaussian, relative
from tests.helpers.wan import inputs, quantized, weights
from turbo_core import dispatch, int8
from turbo_core.int8 import reference
from turbo_core.kernels import sla_attention
from turbo_core.wan import Int8Linear, WanModel, fused

CPU = torch.device("cpu")


@pytest.fixture
def torch_computes(monkeypatch):
    """torch_computes(family, ...): the kernels of these families are not used any more."""

    def change(*families):
        for family in families:
            monkeypatch.setitem(dispatch._verdicts, (CPU, family), "turned off by a test")

    return change


@pytest.mark.parametrize(
    ("quantize", "topk", "precision", "batch"),
    [
        (reference.quantize_block, None, "bf16", 1),
        (reference.quantize_rows, None, "bf16", 2),  # blocks of 128 rows run through samples
        (reference.quantize_block, 0.5, "int8", 1),  # attention hands over int8
    ],
)
def test_fused_blocks(monkeypatch, torch_computes, quantize, topk, precision, batch):
    # 2 * 5 * 9 = 90 tokens: less than a block of queries, a ragged block of keys
    args = inputs(batch, grid=(2, 10, 18))
    model = WanModel.from_state_dict(quantized(weights(sla=True, layers=1), quantize), dtype=torch.bfloat16)
    run = functools.partial(model, *args, topk=topk, precision=precision)
    assert fused.pays(CPU)
    ours = run()
    torch_computes(*dispatch.FAMILIES)
    assert not fused.pays(CPU)
    assert_close(ours, run(), 2e-2)  # layer by layer
    monkeypatch.setattr(fused, "pays", lambda device: True)
    assert_close(ours, run(), 1e-2)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_sparse_attention_in_a_model_of_floats(monkeypatch, torch_computes, precision):
    calls, attention = [], sla_attention.attention
    monkeypatch.setattr(
        sla_attention, "attention", lambda *given, **named: calls.append(1) or attention(*given, **named)
    )
    torch.manual_seed(0)
    model = WanModel(64, 128, 1, 2, text_dim=32, freq_dim=32, sla=True).eval().requires_grad_(False)
    for block in model.blocks:
        block.self_attn.norm_q.weight *= 3  # else attention is nearly even, and any would do
    given = torch.randn(1, 16, 3, 14, 14), torch.tensor([900.0]), torch.randn(1, 8, 32)  # 147 tokens
    out, other = (model(*given, topk=topk, precision=precision) for topk in (0.7, 0.4))
    assert len(calls) == 4
    torch_computes("sla")
    error = relative(out, model(*given, topk=0.7, precision=precision))
    assert len(calls) == 4
    print(f"whole model {precision}: {error:.1e}")
    assert 0 < error < (1e-5 if precision == "bf16" else 1e-3)
    assert relative(out, other) > 10 * error


@pytest.mark.parametrize("quantize", [int8.quantize_block, int8.quantize_rows])
def test_int8_weights_of_any_strides(quantize):
    """A file may hold a weight as the transpose of another: kernels want rows that lie one after another."""
    weight, scale = quantize(gaussian(256, 128))
    x, turned = gaussian(5, 128, seed=1), weight.t().contiguous().t()
    layers = [Int8Linear(w, scale) for w in (weight, turned)]
    assert layers[1].weight.is_contiguous() and torch.equal(layers[0](x), layers[1](x))
