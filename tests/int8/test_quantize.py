"""Quantizing to int8 is the published formula, bit for bit, for any input."""

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.helpers.int8_formats import DTYPES, EXACT, FORMATS, SIZES, rounded
from tests.helpers.tensors import gaussian
from turbo_core import int8
from turbo_core.bench.linear import CHAINS
from turbo_core.errors import TurboError


def check(fmt, x, near_ties_may_differ=False):
    """Quantize x and compare with the float64 formula, bit for bit."""
    before = x.clone()
    q, scale = FORMATS[fmt](x)
    assert torch.equal(x, before) and q.is_contiguous()
    assert q.dtype == torch.int8 and q.shape == x.shape and scale.dtype == torch.float32
    value, exact = EXACT[fmt](x)
    np.testing.assert_array_equal(scale.numpy(), exact.astype(np.float32))
    wrong = q.numpy() != rounded(value)
    if near_ties_may_differ:  # float32 division moves a value by up to 8e-6 of a step
        wrong &= np.abs(value - np.floor(value) - 0.5) > 1e-5
    assert not wrong.any()
    return q, scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_quantization_is_the_formula_bit_for_bit(fmt, k, dtype):
    # values of 8 or 11 significant bits cannot come close to a rounding tie without being one
    valued = torch.bfloat16 if dtype == torch.float32 else dtype
    for seed, m in enumerate(SIZES):
        check(fmt, gaussian(m, k, seed=seed, dtype=valued).to(dtype))


@pytest.mark.parametrize("fmt", FORMATS)
def test_quantization_of_any_float32(fmt):
    for seed, (m, k) in enumerate([(129, 300), (300, 127), (1, 5)]):
        check(fmt, gaussian(m, k, seed=seed) * 3.7, near_ties_may_differ=True)


@pytest.mark.parametrize("fmt", FORMATS)
def test_exact_ties_round_to_even(fmt):
    top = 128.0 if fmt == "block" else 127.0
    x = torch.tensor([[-top, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -125.5]])
    q, _ = check(fmt, x)
    assert q.tolist() == [[-int(top), 0, 2, 2, 0, -2, -2, 126, -126]]


def test_block_extremes_saturate_on_the_positive_side_only():
    x = torch.tensor([[3.0, -3.0, 1.5]])
    q, scale = check("block", x)
    assert q.tolist() == [[127, -128, 64]]
    assert int8.dequantize_block(q, scale).tolist() == [[3.0 * 127 / 128, -3.0, 1.5]]


def test_row_extremes_are_exact_on_both_sides():
    q, scale = check("row", torch.tensor([[2.0, -2.0, 0.0], [0.0, 1.0, -1.0]]))
    assert q.tolist() == [[127, -127, 0], [0, 127, -127]]
    torch.testing.assert_close(int8.dequantize_rows(q, scale)[0], torch.tensor([2.0, -2.0, 0.0]))


@pytest.mark.parametrize("fmt", FORMATS)
def test_zeros_stay_zeros(fmt):
    q, scale = check(fmt, torch.zeros(130, 200))
    assert not q.any() and torch.isfinite(scale).all() and (scale > 0).all()
    assert not int8.dequantize(q, scale).any()


class _NumbersByReciprocal(TorchFunctionMode):
    """Division as CUDA does it: by a number, it is a product with the rounded reciprocal."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.__truediv__, torch.Tensor.div, torch.div) and isinstance(args[1], int | float):
            return args[0] * (1 / torch.tensor(args[1], dtype=torch.float32)).item()
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "plain operations"])
def test_division_by_numbers_on_cards_changes_no_bit(ours, fmt):
    x = gaussian(300, 130)
    expected = FORMATS[fmt](x)
    with _NumbersByReciprocal():
        q, scale = (FORMATS[fmt] if ours else CHAINS[FORMATS[fmt]])(x)
        assert not torch.equal(x / 127, x / torch.tensor(127.0)), "it is at work"
    assert torch.equal(scale, expected[1]) and torch.equal(q, expected[0])


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("size", [3e-8, 9e-9, 1e-12, 1e-40, 1e30])
def test_tiny_and_huge_blocks(fmt, size):
    # under the floor of 1e-8 values fade out instead of dividing by next to nothing; 1e-40 is subnormal
    check(fmt, gaussian(129, 130) * size, near_ties_may_differ=True)


@pytest.mark.parametrize("fmt", FORMATS)
def test_half_precision_subnormals(fmt):
    x = gaussian(64, 130, dtype=torch.float16) * 1e-6
    assert x.abs().max() < torch.finfo(torch.float16).tiny
    q, _ = check(fmt, x)
    assert q.any()


@pytest.mark.parametrize("fmt", FORMATS)
def test_blocks_of_very_different_size_keep_to_themselves(fmt):
    x = gaussian(300, 300, dtype=torch.bfloat16).float()
    x[:128, :128] *= 2.0**20
    x[-1, -1] = 2.0**30
    check(fmt, x)


@pytest.mark.parametrize("fmt", FORMATS)
def test_strided_input(fmt):
    x = gaussian(260, 300, dtype=torch.bfloat16)
    for view in (x.t(), x[3:140, 1::2], x[::2].t(), x[:1].expand(130, -1)):
        q, scale = check(fmt, view)
        q2, scale2 = FORMATS[fmt](view.contiguous())
        assert torch.equal(q, q2) and torch.equal(scale, scale2)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_number_stays_in_its_block(fmt, bad):
    x = gaussian(200, 260)
    x[150, 130] = bad
    decoded = int8.dequantize(*FORMATS[fmt](x))
    rows, cols = (slice(128, 200), slice(128, 256)) if fmt == "block" else (slice(150, 151), slice(None))
    inside = torch.zeros_like(x, dtype=torch.bool)
    inside[rows, cols] = True
    assert decoded[inside].isnan().all() and decoded[~inside].isfinite().all()


def test_stochastic_rounding_is_right_on_average_and_repeats_with_its_seed():
    x = torch.full((128, 128), 0.3) + 0.1 * gaussian(128, 128).clamp(-1, 1)
    x[0, :3] = torch.tensor([128.0, -128.0, 0.0])  # the scale is 1: values round to 0 or 1
    q, scale = int8.quantize_block(x, seed=7)
    assert q[0, :3].tolist() == [127, -128, 0] and scale.item() == 1
    assert set(q[1:].flatten().tolist()) == {0, 1}
    assert q[1:].float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(q, int8.quantize_block(x, seed=7)[0]) and not torch.equal(q, int8.quantize_block(x, seed=8)[0])
    assert not int8.quantize_block(x)[0][1:].any()


@pytest.mark.parametrize("quantize", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("x", [torch.zeros(5), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int32)], ids=str)
def test_only_float_matrices_are_quantized(quantize, x):
    with pytest.raises(TurboError, match=r"\[M, K\]"):
        quantize(x)


def test_rows_are_written_where_they_are_wanted():
    x = gaussian(5, 200)
    q, scale = torch.zeros(9, 200, dtype=torch.int8), torch.zeros(9, 1)
    out = int8.quantize_rows(x, out=(q[2:7], scale[2:7]))
    for whole, part, expected in zip((q, scale), out, int8.quantize_rows(x)):
        assert part.data_ptr() == whole[2:].data_ptr() and torch.equal(whole[2:7], expected)
        assert not whole[:2].any() and not whole[7:].any()
    with pytest.raises(TurboError, match=r"out must be contiguous torch\.int8"):
        int8.quantize_rows(x, out=(q[:4], scale[:5]))
