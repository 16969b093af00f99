"""The int8 products in torch: each form is the product and its epilogue, whole, in blocks, without int8 products."""

import pytest
import torch

from tests.helpers.int8_operands import FORMATS, SHAPES, quantized
from tests.helpers.oracles import assert_near, gated, product, row_squares, row_stats
from tests.helpers.tensors import gaussian
from turbo_core import int8
from turbo_core.int8 import products, reference

HALF = torch.finfo(torch.bfloat16).eps / 2
FLOAT = 2e-6


@pytest.fixture(params=["whole", "blocks", "float products"])
def way(request, monkeypatch):
    """The products as a CPU computes them, one block at a time, and as a device without fast int8 does."""
    if request.param == "blocks":
        monkeypatch.setattr(products, "tile", lambda w_q, by_rows: (128, 128))
    if request.param == "float products":
        monkeypatch.setattr(products, "has_cache", lambda _: False)
    return request.param


@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_form_is_the_product_and_its_epilogue(fmt, m, n, k, way):
    half = HALF if way != "float products" else 4 * HALF  # operands in the result's own half precision
    x, weights = quantized(fmt, m, k, 0), [quantized(fmt, n, k, 1 + i) for i in range(3)]
    w, biases = weights[0], [gaussian(n, seed=7 + i) for i in range(3)]
    residual, gate = gaussian(m, n, seed=5, dtype=torch.bfloat16), gaussian(2 if m % 2 == 0 else 1, n, seed=6)

    assert_near(reference.int8_mm(*x, *w, biases[0], torch.float32), product(x, w, biases[0]), FLOAT)
    assert_near(reference.int8_mm(*x, *w, gelu=True), product(x, w, gelu=True), half)

    y, stats = reference.int8_mm_residual(*x, *w, biases[0], residual, gate)
    assert_near(y, gated(product(x, w, biases[0]), residual, gate), half)
    assert_near(stats, row_stats(y), FLOAT)
    assert reference.int8_mm_residual(*x, *w, None, residual, stats=False)[1] is None

    for dtype, near in ((torch.bfloat16, half), (torch.float32, FLOAT)):
        y, sums = reference.int8_mm_qkv(*x, *zip(*weights), biases, dtype)
        for i in range(3):
            assert_near(y[i], product(x, weights[i], biases[i]), near)
        assert_near(sums, torch.stack([row_squares(y[0]), row_squares(y[1])]), FLOAT)


@pytest.mark.parametrize("m, n, k", SHAPES)
def test_quantized_output_is_the_block_format_of_the_float_result(m, n, k, way):
    x, w, bias = quantized("block", m, k, 0), quantized("block", n, k, 1), gaussian(n, seed=2)
    q, scale = reference.int8_mm_quantize(*x, *w, bias)
    expected_q, expected_scale = int8.quantize_block(product(x, w, bias, gelu=True).float())
    assert_near(scale, expected_scale, FLOAT if way != "float products" else 8 * HALF)
    assert (q.int() - expected_q.int()).abs().max() <= (1 if way != "float products" else 3)


def test_where_both_formats_have_one_shape_they_mean_the_same():
    # K <= 128 and one output: [1, 1] is either; x in three blocks of rows is not in the row format
    x, w = quantized("block", 300, 100, 0), quantized("block", 1, 100, 1)
    assert_near(reference.int8_mm(*x, *w, out_dtype=torch.float32), product(x, w), FLOAT)


def test_strided_operands():
    x, w = quantized("block", 130, 200, 0), quantized("block", 64, 200, 1)
    strided = torch.empty(200, 130, dtype=torch.int8).t().copy_(x[0])
    residual = gaussian(64, 130, seed=2).t()
    assert torch.equal(reference.int8_mm(strided, x[1], *w), reference.int8_mm(*x, *w))
    y, _ = reference.int8_mm_residual(*x, *w, None, residual)
    assert y.is_contiguous()
    assert_near(y, gated(product(x, w), residual, None), FLOAT)


def test_no_rows():
    x, w = quantized("row", 2, 128, 0), quantized("row", 64, 128, 1)
    y, stats = reference.int8_mm_residual(x[0][:0], x[1][:0], *w, None, torch.empty(0, 64))
    assert y.shape == (0, 64) and stats.shape == (1, 0, 2)


def test_sums_of_long_rows_stay_in_float32_under_autocast(monkeypatch):
    """A CPU without int8 products adds the sums of 1024 columns at a time; in bfloat16 it was 0.1 % off."""
    monkeypatch.setattr(products, "int_mm_pays", lambda _: False)
    x, w = gaussian(40, 2500, seed=1), int8.quantize_rows(gaussian(30, 2500, seed=2))
    alone = int8.int8_linear(x, *w)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int8.int8_linear(x, *w), alone)
