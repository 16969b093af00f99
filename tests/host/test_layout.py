"""The block format as a comfy_kitchen tensor, and the row format beside comfy_kitchen's own: what the host brings."""

import pytest
import torch

pytest.importorskip("comfy_kitchen", reason="comfy_kitchen is not installed")

from turbo_core.int8 import dequantize_block, int8_linear, layout, quantize_block, quantize_rows


@pytest.fixture
def weight():
    """200 x 300: ragged in both directions, two by three blocks."""
    torch.manual_seed(0)
    return torch.randn(200, 300)


@pytest.fixture
def quantized(weight):
    return layout.QuantizedTensor.from_float(weight, layout.NAME)


def test_stores_what_quantize_block_gives(weight, quantized):
    q, scale = quantize_block(weight)
    assert torch.equal(quantized._qdata, q) and torch.equal(quantized.params.scale, scale)
    assert torch.equal(quantized.dequantize(), dequantize_block(q, scale, torch.float32))
    assert quantized.shape == weight.shape and quantized.nbytes == q.nbytes
    assert quantized.state_dict("x.weight").keys() == {"x.weight", "x.weight_scale"}


def test_wrap_is_the_same_tensor(quantized):
    plain = layout.TurboBlockInt8Layout.get_plain_tensors(quantized)
    again = layout.wrap(*plain, torch.float32)
    assert torch.equal(again.dequantize(), quantized.dequantize())


@pytest.mark.parametrize("lead", [(5,), (2, 7), ()])
def test_linear_goes_through_int8(weight, quantized, lead):
    x, bias = torch.randn(*lead, 300), torch.randn(200)
    plain = layout.TurboBlockInt8Layout.get_plain_tensors(quantized)
    with torch.inference_mode():
        assert torch.equal(torch.nn.functional.linear(x, quantized, bias), int8_linear(x, *plain, bias))
        assert torch.equal(torch.nn.functional.linear(x, quantized), int8_linear(x, *plain))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_matrix_products_with_the_transpose_go_through_int8(weight, mode):
    with mode():  # the weight made inside as well, as the server does: a view of an outside one is refused by torch
        quantized = layout.QuantizedTensor.from_float(weight, layout.NAME)
        plain = layout.TurboBlockInt8Layout.get_plain_tensors(quantized)
        x, bias = torch.randn(5, 300), torch.randn(200)
        assert torch.equal(torch.mm(x, quantized.t()), int8_linear(x, *plain))
        assert torch.equal(torch.addmm(bias, x, quantized.t()), int8_linear(x, *plain, bias))


@torch.inference_mode()
def test_other_products_fall_back_to_floats(weight):
    """Not transposed, or scaled: no int8 form, but still right."""
    quantized = layout.QuantizedTensor.from_float(weight, layout.NAME)
    x, floats = torch.randn(4, 200), quantized.dequantize()
    torch.testing.assert_close(torch.mm(x, quantized), x @ floats)
    y, c = torch.randn(4, 300), torch.randn(4, 200)
    torch.testing.assert_close(torch.addmm(c, y, quantized.t(), beta=0.5, alpha=2.0), 0.5 * c + 2 * y @ floats.t())
    assert torch.equal(quantized.t().t().dequantize(), floats)
    assert torch.equal(quantized.t().dequantize(), floats.t())
    torch.testing.assert_close(torch.nn.functional.linear(x, quantized.t()), x @ floats)


def test_moves_clones_and_copies(quantized):
    """What ModelPatcher does: clone, change the dtype it presents, copy into place, flatten for pinned buffers."""
    clone = quantized.clone()
    clone._qdata.zero_()
    clone.params.scale.zero_()
    assert quantized._qdata.any() and quantized.params.scale.all()
    half = quantized.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.dequantize().dtype == torch.bfloat16
    assert torch.equal(half._qdata, quantized._qdata)
    clone.copy_(quantized)
    assert torch.equal(clone.dequantize(), quantized.dequantize())
    parts, context = quantized.__tensor_flatten__()
    again = layout.QuantizedTensor.__tensor_unflatten__({p: getattr(quantized, p) for p in parts}, context, 0, 0)
    assert torch.equal(again.dequantize(), quantized.dequantize()) and again.params == quantized.params
    parameter = torch.nn.Parameter(quantized, requires_grad=False)
    assert layout.is_block(parameter) and not layout.is_block(parameter.t())


def test_requantizing_after_a_lora(weight, quantized):
    """As the host merges one: dequantize, add, quantize anew with stochastic rounding from a seed."""
    changed = quantized.dequantize() + 0.01 * torch.randn(200, 300)
    once, twice, other = (
        quantized.requantize_from_float(changed, scale="recalculate", stochastic_rounding=seed) for seed in (5, 5, 6)
    )
    assert torch.equal(once._qdata, twice._qdata)
    assert not torch.equal(once._qdata, other._qdata)
    step = once.params.scale.max()
    assert (once.dequantize() - changed).abs().max() <= 1.01 * step
    assert layout.is_block(once)


def test_a_given_scale_is_refused(weight):
    with pytest.raises(ValueError, match="recalculate"):
        layout.QuantizedTensor.from_float(weight, layout.NAME, scale=torch.ones(1))


def test_row_format_is_the_hosts_own():
    from comfy_kitchen.backends.eager import quantization as host

    for seed, (m, k) in enumerate([(1, 1), (5, 127), (129, 300), (64, 1536)]):
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(seed))
        for ours, theirs in zip(quantize_rows(x), host.quantize_int8_rowwise(x)):
            assert torch.equal(ours, theirs)
