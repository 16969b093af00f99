"""The int8 products against float64 and their torch reference."""

import pytest
import torch
from turbo_core.kernels.int8_mm import int8_mm, int8_mm_qkv, int8_mm_quantize, int8_mm_residual

from tests.helpers.int8_operands import FORMATS, SHAPES, quantized
from tests.helpers.oracles import assert_near, gated, product, row_squares, row_stats
from tests.helpers.tensors import gaussian
from turbo_core import int8
from turbo_core.int8 import reference
from turbo_core.int8.formats import in_blocks
from turbo_core.kernels import int8_configs, launch

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # GELU's, which is right at infinity
HALF = torch.finfo(torch.bfloat16).eps / 2
FLOAT = 2e-6


@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_plain(fmt, m, n, k):
    x, w, bias = quantized(fmt, m, k, 0), quantized(fmt, n, k, 1), gaussian(n, seed=2)
    y = int8_mm(*x, *w, bias, torch.float32)
    assert_near(y, product(x, w, bias), FLOAT)
    assert_near(y, reference.int8_mm(*x, *w, bias, torch.float32), FLOAT)
    y = int8_mm(*x, *w, None, torch.bfloat16, gelu=True)
    assert y.dtype == torch.bfloat16
    assert_near(y, product(x, w, gelu=True), HALF)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_bias_and_residual_of_any_float_type(dtype):
    x, w, bias = quantized("block", 5, 200, 0), quantized("block", 64, 200, 1), gaussian(64, seed=2).to(dtype)
    residual = gaussian(5, 64, seed=3).to(dtype)
    assert_near(int8_mm(*x, *w, bias, dtype), product(x, w, bias), torch.finfo(dtype).eps / 2 + FLOAT)
    y, _ = int8_mm_residual(*x, *w, bias, residual)
    assert y.dtype == dtype
    assert_near(y, gated(product(x, w, bias), residual, None), torch.finfo(dtype).eps / 2 + FLOAT)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_quantized_output(m, n, k, gelu):
    x, w, bias = quantized("block", m, k, 0), quantized("block", n, k, 1), gaussian(n, seed=2)
    q, scale = int8_mm_quantize(*x, *w, bias, gelu)
    expected_q, expected_scale = reference.int8_mm_quantize(*x, *w, bias, gelu)
    assert_near(scale, expected_scale, FLOAT)
    # a value next to a tie may go the other way where float32 sums differ in their last bit
    assert (q.int() - expected_q.int()).abs().max() <= 1 and (q != expected_q).float().mean() < 1e-3
    expected = product(x, w, bias, gelu)
    steps = in_blocks(expected - int8.dequantize(q, scale, torch.float64)).abs() / scale[:, None, :, None]
    assert steps.max() <= 1 + 1e-3  # +amax is stored one step short; all else within half a step
    assert (steps > 0.5 + 1e-3).float().mean() < 1e-2


@pytest.mark.parametrize("groups", [0, 1, 2])  # two groups: 124 rows each, their border lies inside a tile
@pytest.mark.parametrize("m, n, k", [SHAPES[1], SHAPES[3]])
@pytest.mark.parametrize("fmt", FORMATS)
def test_residual_gate_and_row_statistics(fmt, m, n, k, groups):
    if groups and m % groups:
        groups = m  # a gate for each row
    x, w, bias = quantized(fmt, m, k, 0), quantized(fmt, n, k, 1), gaussian(n, seed=2)
    residual = 10 * gaussian(m, n, seed=3).to(torch.bfloat16)
    gate = gaussian(groups, n, seed=4) if groups else None
    y, stats = int8_mm_residual(*x, *w, bias, residual, gate)
    assert y.dtype == torch.bfloat16
    assert_near(y, gated(product(x, w, bias), residual, gate), HALF)
    for i in range(2):
        assert_near(stats[..., i], row_stats(y)[..., i], FLOAT)
    alone, none = int8_mm_residual(*x, *w, bias, residual, gate, stats=False)
    assert none is None and torch.equal(alone, y)


@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_q_k_v_and_the_sums_of_their_squares(fmt, m, n, k):
    x, weights = quantized(fmt, m, k, 0), [quantized(fmt, n, k, 1 + i) for i in range(3)]
    biases = [gaussian(n, seed=7 + i) for i in range(3)]
    y, sums = int8_mm_qkv(*x, *zip(*weights), biases)
    for i in range(3):
        assert_near(y[i], product(x, weights[i], biases[i]), HALF)
    for i in range(2):
        assert_near(sums[i], row_squares(y[i]), FLOAT)
    plain, _ = int8_mm_qkv(*x, *zip(*weights), out_dtype=torch.float32)
    assert_near(plain[2], product(x, weights[2]), FLOAT)


CONFIGS = [
    int8_configs.DEFAULT._replace(block_m=64, group_m=1),
    int8_configs.DEFAULT._replace(block_n=256),
    int8_configs.DEFAULT._replace(depth=64),
    *(int8_configs.DEFAULT._replace(variant=variant) for variant in int8_configs.VARIANTS[1:]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_way_to_cut_it_up_gives_the_same(fmt, config, monkeypatch):
    m, n, k = 248, 300, 208  # several tiles in one program; K is ragged but addresses divide by 16
    x, weights = quantized(fmt, m, k, 0), [quantized(fmt, n, k, 1 + i) for i in range(3)]
    bias, residual, gate = gaussian(n, seed=5), gaussian(m, n, seed=6), gaussian(2, n, seed=7)

    def results():
        return [
            int8_mm(*x, *weights[0], bias),
            *int8_mm_residual(*x, *weights[0], bias, residual, gate),
            *int8_mm_qkv(*x, *zip(*weights), [bias] * 3),
        ]

    expected = results()
    monkeypatch.setattr(int8_configs, "config", lambda *_: config)
    for y, as_shipped in zip(results(), expected):
        assert_near(y, as_shipped, HALF)


@pytest.mark.parametrize("variant", ["persistent", "converting"])
def test_a_card_of_any_number_of_multiprocessors_gives_the_same_bits(variant, monkeypatch):
    """One that walks through all nine tiles, one that leaves a ragged last round, more than there are tiles."""
    config = int8_configs.DEFAULT._replace(variant=variant)
    x, weights = quantized("block", 248, 256, 0), [quantized("block", 300, 256, 1 + i) for i in range(3)]
    results = []
    for count in (1, 7, 188):
        monkeypatch.setattr(launch, "processors", lambda device, count=count: count)
        results.append(torch.cat([t.flatten() for t in int8_mm_qkv(*x, *zip(*weights), config=config)]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_k_that_tma_cannot_address_takes_pointers():
    x, w = quantized("block", 5, 200, 0), quantized("block", 64, 200, 1)
    config = int8_configs.DEFAULT._replace(variant="persistent")
    assert_near(int8_mm(*x, *w, out_dtype=torch.float32, config=config), product(x, w), FLOAT)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_largest_products_are_exact(fmt):
    # 128 products of -128 and -128 are 2^21, half of what the conversion in registers holds
    x = torch.full((5, 384), -128, dtype=torch.int8)
    x[1::2] = 127
    w = torch.full((64, 384), -128, dtype=torch.int8)
    w[::3] = 127
    shapes = [(1, 3), (1, 3)] if fmt == "block" else [(5, 1), (64, 1)]
    y = int8_mm(x, torch.ones(shapes[0]), w, torch.ones(shapes[1]), out_dtype=torch.float32)
    assert torch.equal(y.long(), x.long() @ w.long().t())


def test_a_bad_number_stays_in_its_blocks():
    x, w = quantized("block", 248, 200, 0), quantized("block", 200, 200, 1)
    x[1][1, 0] = torch.nan
    y = int8_mm(*x, *w)
    assert y[128:].isnan().all() and y[:128].isfinite().all()
    _, scale = int8_mm_quantize(*x, *w)
    assert scale[1].isnan().all() and scale[0].isfinite().all()


def test_no_rows():
    x, w = quantized("block", 128, 128, 0), quantized("block", 64, 128, 1)
    y = int8_mm(x[0][:0], x[1][:0], *w)
    assert y.shape == (0, 64)


def test_operands_that_do_not_fit_are_refused():
    (x, xs), (w, ws) = quantized("block", 130, 256, 0), quantized("block", 64, 256, 1)
    strided = torch.empty(256, 130, dtype=torch.int8).t()
    row = torch.ones(64, 1)  # the scale of another format than x's
    narrow = int8_configs.DEFAULT._replace(block_m=64)
    for words, call in [
        ("scales", lambda: int8_mm(x, xs, w, row)),
        ("scales", lambda: int8_mm(x, xs[:1], w, ws)),
        ("contiguous", lambda: int8_mm(strided, xs, w, ws)),
        ("one scale block", lambda: int8_mm_quantize(x, xs, w, ws, config=narrow)),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


def test_a_variant_of_fixed_depth_refuses_another():
    config = int8_configs.DEFAULT._replace(variant="persistent", depth=64)
    with pytest.raises(ValueError, match="128 deep"):
        int8_mm(*quantized("block", 5, 208, 0), *quantized("block", 64, 208, 1), config=config)
    with pytest.raises(ValueError):
        int8_configs._checked("block plain long", config)
