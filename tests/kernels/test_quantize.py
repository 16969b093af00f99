"""The quantization kernels give the bits of their reference."""

import numpy as np
import pytest
import torch

from tests.helpers.tensors import gaussian
from turbo_core.int8 import reference
from turbo_core.kernels import quantize

FORMATS = {
    "block": (quantize.quantize_block, reference.quantize_block),
    "row": (quantize.quantize_rows, reference.quantize_rows),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [
    (1, 128),  # one row: 127 of the block's rows are not there
    (5, 200),  # a row count and a K that no tile divides
    (127, 1),  # one column
    (129, 384),  # one row more than a block
    (256, 256),  # whole blocks
]
ROWS = [(3, 1536), (2, 5120), (1, 8960), (1, 13824), (9, 33)]  # the widths of the models, in parts; a narrow ragged one


def check(fmt, x):
    kernel, by_torch = FORMATS[fmt]
    before = x.clone()
    q, scale = kernel(x)
    expected, expected_scale = by_torch(x)
    assert q.dtype == torch.int8 and q.is_contiguous() and scale.shape == expected_scale.shape
    assert torch.equal(q, expected), (q.int() - expected).nonzero()[:5]
    torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)
    return q, scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, k", SHAPES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_bits_of_the_reference(fmt, m, k, dtype):
    check(fmt, gaussian(m, k, dtype=dtype))


@pytest.mark.parametrize("m, k", ROWS)
def test_rows_in_parts(m, k):
    check("row", gaussian(m, k, dtype=torch.bfloat16))


@pytest.mark.parametrize("fmt", FORMATS)
def test_division_is_correctly_rounded(fmt):
    # next to ties, where a product with the reciprocal goes wrong: 32 scales, a row of 128 or a block of 1 x 128 each
    largest = gaussian(32, 1).abs() + 1
    x = largest / (128 if fmt == "block" else 127) * (torch.arange(128) - 63.5)
    for _ in range(3):
        x[:, 0] = largest[:, 0]
        check(fmt, x if fmt == "row" else x.view(1, -1))
        x = x.nextafter(torch.tensor(torch.inf))


@pytest.mark.parametrize("fmt", FORMATS)
def test_exact_ties_round_to_even_and_extremes_saturate(fmt):
    top = 128 if fmt == "block" else 127
    halves = torch.arange(-2 * top, 2 * top + 1) / 2
    x = halves[None] if fmt == "row" else torch.nn.functional.pad(halves, (0, 127)).view(5, 128)  # one scale for all
    q, scale = check(fmt, x)
    assert scale.unique().tolist() == [1.0] and q.min() == -top
    assert torch.equal(q.float(), x.round().clamp(max=127))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-12, 9e-9, 3e-8, 1e30, 7e37])
def test_zeros_subnormals_tiny_and_huge(fmt, size):
    # at 7e37 a reciprocal is subnormal, and the largest values are near float32's own largest
    check(fmt, gaussian(5, 130) * size)


@pytest.mark.parametrize("fmt", FORMATS)
def test_half_precision_subnormals(fmt):
    x = gaussian(5, 130, dtype=torch.float16) * 1e-6
    q, _ = check(fmt, x)
    assert q.any()


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_bad_value_spoils_its_block_and_no_other(fmt, dtype, bad):
    x = gaussian(129, 260, dtype=dtype)
    x[128, 3] = bad  # the first ragged block, or one row
    q, scale = check(fmt, x)
    assert not scale[-1, 0].isfinite() and scale[:-1].isfinite().all() and scale[-1, 1:].isfinite().all()
    assert not q[128, 128 if fmt == "row" else 0].any()


@pytest.mark.parametrize("fmt", FORMATS)
def test_views_are_read_where_they_lie(fmt):
    base = gaussian(12, 300, dtype=torch.bfloat16)
    for x in (base[3:8, 40:168], base.t(), base[::2, ::3], base[:1].expand(9, 300), base[0, 5:205][None]):
        check(fmt, x)


@pytest.mark.parametrize("fmt", FORMATS)
def test_offsets_past_32_bits(fmt):
    # memory that is never touched is never there: 4.3 GB of addresses
    x = torch.from_numpy(np.empty((1 << 31) + 128, np.float16)).as_strided((3, 128), (1 << 30, 1))
    x.copy_(gaussian(3, 128))
    check(fmt, x)


@pytest.mark.parametrize("fmt", FORMATS)
def test_no_rows(fmt):
    q, scale = check(fmt, torch.zeros(0, 256))
    assert q.shape == (0, 256) and scale.numel() == 0


@pytest.mark.parametrize("fmt", FORMATS)
def test_other_input_is_refused(fmt):
    for x in (torch.zeros(2, 3, 4), torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.int8)):
        with pytest.raises(ValueError, match=r"expected .*got torch\.\w+ \["):
            FORMATS[fmt][0](x)


def test_rows_are_written_where_they_are_wanted():
    x = gaussian(5, 200)
    q, scale = torch.zeros(9, 200, dtype=torch.int8), torch.zeros(9, 1)
    quantize.quantize_rows(x, out=(q[2:7], scale[2:7]))
    for whole, expected in zip((q, scale), quantize.quantize_rows(x)):
        assert torch.equal(whole[2:7], expected) and not whole[:2].any() and not whole[7:].any()
