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


@pytest.mark.parametrize("act", [None, "gelu_tanh", "rms_norm"])
def test_an_activation_before_and_a_sum_after(weight, quantized, act):
    """As comfy_kitchen asks layouts since 0.2.37; no operand changes."""
    x, norm, bias, residual, gate = (
        torch.randn(*shape) for shape in [(2, 7, 300), (300,), (200,), (2, 7, 200), (200,)]
    )
    before = [t.clone() for t in (x, norm, bias, residual, gate, quantized._qdata)]
    acted = {
        None: x,
        "gelu_tanh": torch.nn.functional.gelu(x, approximate="tanh"),
        "rms_norm": torch.nn.functional.rms_norm(x, (300,), norm, 1e-6),
    }[act]
    plain = int8_linear(acted, *layout.TurboBlockInt8Layout.get_plain_tensors(quantized), bias)
    ask = layout.TurboBlockInt8Layout.linear_input_act
    given = quantized, x, bias, act, norm, 1e-6
    assert torch.equal(ask(*given), plain)
    assert torch.equal(ask(*given, residual), residual + plain)
    assert torch.equal(ask(*given, residual, gate), torch.addcmul(residual, plain, gate))
    assert all(map(torch.equal, before, (x, norm, bias, residual, gate, quantized._qdata)))


def test_what_is_not_computed_is_declined(quantized):
    """Never an exception: the host computes it in steps."""
    ask, x = layout.TurboBlockInt8Layout.linear_input_act, torch.randn(4, 300)
    declined = [
        ask(quantized, x, input_act="swiglu"),
        ask(quantized, x, input_act="rms_norm", input_act_weight=torch.nn.RMSNorm(300)),
        ask(quantized, x, input_act="rms_norm", input_act_weight=torch.ones(200)),
        ask(quantized.t(), x),
        ask(quantized, x[:, :200]),
        ask(quantized, x.long()),
        ask(quantized, quantized),
        ask(quantized, torch.tensor(1.0)),
        ask(quantized, x, torch.ones(300)),
        ask(quantized, x, residual=torch.ones(3, 200)),
        ask(quantized, x, residual=torch.ones(5, 4, 200)),
        ask(quantized, x, residual=torch.ones(4, 200), residual_scale=0.5),
    ]
    assert all(result is NotImplemented for result in declined)


@torch.inference_mode()
def test_parts_and_joints_are_floats(weight):
    """The host joins q, k and v of some models: one block's scale would stand for rows that it never saw."""
    quantized = layout.QuantizedTensor.from_float(weight, layout.NAME)
    floats = quantized.dequantize()
    for change in [
        lambda w: torch.cat([w, w]),
        lambda w: torch.cat([w, torch.zeros(8, 300)]),
        lambda w: torch.stack([w, w]),
        lambda w: w[:130],
        lambda w: w[3:5, 7:],
        lambda w: w.narrow(1, 0, 129),
        lambda w: w.chunk(2)[1],
        lambda w: w.split([50, 150])[1],
        lambda w: w.view(-1),
        lambda w: w.reshape(100, 600),
        lambda w: w.transpose(0, 1),
        lambda w: w.unsqueeze(0),
        lambda w: w[[3, 1]],
    ]:
        result = change(quantized)
        assert not isinstance(result, layout.QuantizedTensor) and torch.equal(result, change(floats))
