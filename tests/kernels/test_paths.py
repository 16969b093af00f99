"""turbo_core takes the kernels where they compute, and torch where something learns."""

import inspect

import pytest
import torch

from tests.helpers.int8_operands import FORMATS, quantized
from tests.helpers.oracles import assert_near, product
from tests.helpers.tensors import gaussian
from turbo_core import int8
from turbo_core.diagnostics import doctor
from turbo_core.int8 import fast, formats, operations, products, reference
from turbo_core.kernels import norm
from turbo_core.wan import RMSNorm


def test_fast_and_reference_have_the_same_operations():
    assert operations(torch.device("cpu")) is fast
    for name in fast.__all__:
        ours, theirs = (list(inspect.signature(getattr(module, name)).parameters) for module in (fast, reference))
        assert [name for name in ours if name != "config"] == [name for name in theirs if name != "seed"], name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_int8_linear_takes_the_kernels_and_no_float_copy_of_the_weight(fmt, dtype, monkeypatch):
    x = gaussian(2, 400, 60).to(dtype).transpose(1, 2)[..., ::2]  # [2, 60, 200], no stride is 1
    w, bias = quantized(fmt, 130, 200, 1), gaussian(130, seed=2).to(dtype)
    with monkeypatch.context() as patch:
        for module in (formats, products):
            patch.setattr(module, "dequantize_block", lambda *_: pytest.fail("a float copy of the weight"))
        patch.setattr(reference, "int8_linear", lambda *_: pytest.fail("the torch path"))
        y = int8.int8_linear(x, *w, bias)
    quantize = reference.quantize_block if fmt == "block" else reference.quantize_rows
    assert y.shape == (2, 60, 130) and y.dtype == dtype
    x_q = quantize(x.reshape(-1, 200))
    assert_near(y.flatten(0, 1), product(x_q, w, bias), torch.finfo(dtype).eps / 2 + 2e-6)
    assert "Triton" in doctor.int8_path("cpu", fmt)


def test_the_norms_of_a_model_take_the_kernel(monkeypatch):
    taken, kernel = [], norm.rms_norm
    monkeypatch.setattr(fast, "rms_norm", lambda x, *given: taken.append(x.shape) or kernel(x, *given))
    layer = RMSNorm(256, 1e-6).requires_grad_(False)
    x = gaussian(1, 6, 256).expand(2, 6, 256)
    y = layer(x)
    assert taken == [(12, 256)] and torch.equal(y.flatten(0, 1), kernel(x.reshape(12, 256), layer.weight, 1e-6))


def test_where_something_learns_the_linear_is_a_kernel_with_a_gradient(monkeypatch):
    taken, kernel = [], fast.int8_linear
    monkeypatch.setattr(fast, "int8_linear", lambda *given: taken.append(1) or kernel(*given))
    x, bias = gaussian(5, 200).requires_grad_(), torch.zeros(64, requires_grad=True)
    weight = quantized("row", 64, 200, 1)
    of_x, of_bias = torch.autograd.grad(int8.int8_linear(x, *weight, bias).sum(), (x, bias))
    assert torch.equal(of_bias, torch.full((64,), 5.0)) and len(taken) == 1
    torch.testing.assert_close(of_x, int8.dequantize(*weight).sum(0).expand(5, 200))


def test_where_something_learns_the_rest_is_torch(monkeypatch):
    for name in fast.__all__:
        monkeypatch.setattr(fast, name, lambda *_, **__: pytest.fail("kernels have no gradient"))
    x, weight = gaussian(5, 200).requires_grad_(), torch.ones(200)
    assert operations(x.device, ("norm",), x, weight) is reference
    (gradient,) = torch.autograd.grad(RMSNorm(200, 1e-6)(x[None]).square().sum(), x)
    assert gradient.any()
    with torch.no_grad():
        assert operations(x.device, ("norm",), x, weight) is fast
