"""The norm kernels against float64 and their reference."""

import pytest
import torch
from turbo_core.kernels.row_stats import row_stats

from tests.helpers.oracles import layer_norm, rms_norm
from tests.helpers.tensors import gaussian
from turbo_core.int8 import reference
from turbo_core.kernels import norm

EPS = 1e-6
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# rows, columns, groups
SHAPES = [
    (1, 128, 1),  # one row: 127 of the block's rows are not there
    (5, 200, 1),  # a row count and a K that no tile divides
    (256, 128, 2),  # groups as long as a block
    (258, 130, 3),  # groups of 86 rows: a block sees two or three of them; two columns in the last span
    (6, 128, 6),  # a group for every row
    (9, 1536, 1),  # the width of 1.3B
    (3, 5120, 1),  # the width of 14B
]
FORMS = {  # what a Wan block asks for, and each operand on its own
    "plain": "",
    "modulated": "shift scale",
    "affine": "weight bias",
    "all": "weight bias shift scale",
    "weight, shift": "weight shift",
    "bias, scale": "bias scale",
}


def make(m, k, groups, form, dtype=torch.float32):
    """x with a mean and a deviation of its own in every row, and the operands of a form."""
    x = gaussian(m, k) * gaussian(m, 1, seed=1).exp() + 3 * gaussian(m, 1, seed=2)
    shapes = {"weight": (k,), "bias": (k,), "shift": (groups, k), "scale": (groups, k)}
    return x.to(dtype), {name: gaussian(*shapes[name], seed=ord(name[1])) for name in FORMS[form].split()}


def check_quantized(q, scale, y, rows):
    """q and scale are y, quantized: only a value next to a tie may fall to the other side."""
    m, k = y.shape
    if rows:
        expected = y.abs().amax(1, keepdim=True) / 127
        spread = expected
    else:
        padded = torch.nn.functional.pad(y, (0, -k % 128, 0, -m % 128)).unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
        expected = padded.abs().amax((1, 3)) / 128
        spread = expected.repeat_interleave(128, 0)[:m].repeat_interleave(128, 1)[:, :k]
    assert q.dtype == torch.int8 and q.shape == y.shape and scale.dtype == torch.float32
    torch.testing.assert_close(scale.double(), expected, rtol=3e-5, atol=1e-10)
    value = y / spread
    wrong = (q - value.round().clamp(-128, 127)).abs()
    near_tie = (value - value.floor() - 0.5).abs() < 5e-3
    assert wrong.max() <= 1 and not (wrong.bool() & ~near_tie).any()


@pytest.mark.parametrize("rows", [False, True], ids=["block", "row"])
@pytest.mark.parametrize(
    "m, k, groups, form", [(*shape, "all") for shape in SHAPES] + [(5, 200, 1, form) for form in FORMS if form != "all"]
)
def test_layer_norm_against_float64(m, k, groups, form, rows):
    x, operands = make(m, k, groups, form)
    check_quantized(*norm.layer_norm_quantize(x, EPS, **operands, rows=rows), layer_norm(x, EPS, **operands), rows)


@pytest.mark.parametrize("rows", [False, True], ids=["block", "row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_against_its_reference(dtype, rows):
    x, operands = make(132, 200, 2, "all", dtype)
    check_quantized(*norm.layer_norm_quantize(x, EPS, **operands, rows=rows), layer_norm(x, EPS, **operands), rows)
    for given in (None, reference.row_stats(x)):
        q, scale = norm.layer_norm_quantize(x, EPS, **operands, rows=rows, stats=given)
        expected_q, expected_scale = reference.layer_norm_quantize(x, EPS, **operands, rows=rows, stats=given)
        torch.testing.assert_close(scale, expected_scale, rtol=1e-5, atol=0)
        wrong = (q.int() - expected_q).abs()
        assert wrong.max() <= 1 and wrong.count_nonzero() <= 20  # of 26,400


@pytest.mark.parametrize("rows", [False, True], ids=["block", "row"])
def test_a_mean_far_from_zero(rows):
    # the mean of squares less the square of the mean keeps no digit of a variance of 1 here
    x = gaussian(130, 256) + 5000 * gaussian(130, 1, seed=1)
    y = layer_norm(x, EPS)
    q, scale = norm.layer_norm_quantize(x, EPS, rows=rows)
    spread = scale.double() if rows else scale.double().repeat_interleave(128, 0)[:130].repeat_interleave(128, 1)
    assert (q * spread - y).abs().max() < 0.52 * scale.max() + (0 if rows else scale.max())


@pytest.mark.parametrize("rows", [False, True], ids=["block", "row"])
def test_constant_rows_become_the_shift(rows):
    # no deviation at all: eps alone divides
    x = torch.full((130, 256), 0.75)
    shift = gaussian(1, 256)
    check_quantized(*norm.layer_norm_quantize(x, EPS, shift=shift, rows=rows), layer_norm(x, EPS, shift=shift), rows)


def test_given_statistics_are_the_ones_used():
    x = gaussian(130, 256)
    stats = row_stats(x)
    stats[..., 0] += 0.5
    stats[..., 1] *= 4
    means, squares = (t.double() for t in stats.unbind(-1))
    mean = means.mean(0)
    variance = (squares + 128 * (means - mean).square()).sum(0) / 256
    y = (x.double() - mean[:, None]) / (variance + EPS).sqrt()[:, None]
    check_quantized(*norm.layer_norm_quantize(x, EPS, stats=stats), y, False)


@pytest.mark.parametrize("rows", [False, True], ids=["block", "row"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_spoils_its_blocks_and_no_other(bad, rows):
    x = gaussian(132, 256)
    x[130, 3] = bad
    q, scale = norm.layer_norm_quantize(x, EPS, rows=rows)
    good = slice(0, 130) if rows else slice(0, 1)
    assert scale[good].isfinite().all() and not scale[130 if rows else 1].isfinite().any()
    assert not q[130].any() and q[:128].any()


def test_views_are_read_where_they_lie():
    base = gaussian(12, 300, dtype=torch.bfloat16)
    for x in (base[3:8, 40:168], base.t()[:140], base[::2, ::3], base[:1].expand(9, 300)):
        weight = gaussian(x.shape[1])
        for rows in (False, True):
            for a, b in zip(
                norm.layer_norm_quantize(x, EPS, rows=rows), norm.layer_norm_quantize(x.contiguous(), EPS, rows=rows)
            ):
                assert torch.equal(a, b)
        assert torch.equal(norm.rms_norm(x, weight, EPS), norm.rms_norm(x.contiguous(), weight, EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, k", [(1, 128), (5, 200), (9, 1536), (2, 8960)])
def test_rms_norm(m, k, dtype):
    x, operands = make(m, k, 1, "affine", dtype)
    y = norm.rms_norm(x, operands["weight"], EPS)
    expected = rms_norm(x, operands["weight"], EPS)
    half_step = torch.finfo(dtype).eps / 2 * 1.01 if dtype != torch.float32 else 1e-6  # rounded once, at the end
    torch.testing.assert_close(y.double(), expected, rtol=half_step, atol=1e-7)
    assert y.dtype == dtype


def test_no_rows():
    x, weight = torch.zeros(0, 256), torch.ones(256)
    assert row_stats(x).shape == (2, 0, 2)
    assert [t.shape for t in norm.layer_norm_quantize(x, EPS)] == [(0, 256), (0, 2)]
    assert [t.shape for t in norm.layer_norm_quantize(x, EPS, rows=True)] == [(0, 256), (0, 1)]
    assert norm.rms_norm(x, weight, EPS).shape == (0, 256)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: norm.rms_norm(x, torch.ones(100), EPS),
        lambda x: norm.rms_norm(x, torch.ones(400)[::2], EPS),
        lambda x: norm.layer_norm_quantize(x, EPS, weight=torch.ones(100)),
        lambda x: norm.layer_norm_quantize(x, EPS, shift=torch.ones(3, 200)),
        lambda x: norm.layer_norm_quantize(x, EPS, shift=torch.ones(2, 200), scale=torch.ones(1, 200)),
        lambda x: norm.layer_norm_quantize(x, EPS, stats=torch.ones(1, 4, 2)),
    ],
)
def test_operands_that_do_not_fit_are_no_reads_beyond_them(call):
    with pytest.raises(ValueError, match=r"must be contiguous floats|do not divide"):
        call(torch.ones(4, 200))
