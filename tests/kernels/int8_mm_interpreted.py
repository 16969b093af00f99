"""The int8 products in Triton's interpreter against float64 and their torch twins; run by test_int8_mm.py."""

import pytest
import torch
from turbo_core.kernels.int8_mm import int8_mm as int8_mm_kernel

from kernels import int8_configs, launch
from tests.kernels.int8_mm_cases import (
    FORMATS,
    SHAPES,
    assert_near,
    exact,
    exact_squares,
    exact_stats,
    gated,
    gaussian,
    quantized,
)
from tests.kernels.poison import poisoned
from tests.triton_cpu.interpreter import repair
from turbo_core import int8
from turbo_core.diagnostics import doctor
from turbo_core.errors import TurboError
from turbo_core.int8 import matmul, reference

repair()
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # GELU's, which is right at infinity
HALF = torch.finfo(torch.bfloat16).eps / 2
FLOAT = 2e-6


@pytest.fixture(autouse=True)
def poison():
    with poisoned():
        yield


@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_plain(fmt, m, n, k):
    x, w, bias = quantized(fmt, m, k, 0), quantized(fmt, n, k, 1), gaussian(n, seed=2)
    y = matmul.int8_mm(*x, *w, bias, torch.float32)
    assert_near(y, exact(x, w, bias), FLOAT)
    assert_near(y, reference.int8_mm(*x, *w, bias, torch.float32), FLOAT)
    y = matmul.int8_mm(*x, *w, None, torch.bfloat16, gelu=True)
    assert y.dtype == torch.bfloat16
    assert_near(y, exact(x, w, gelu=True), HALF)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_bias_and_residual_of_any_float_type(dtype):
    x, w, bias = quantized("block", 5, 200, 0), quantized("block", 64, 200, 1), gaussian(64, seed=2).to(dtype)
    residual = gaussian(5, 64, seed=3).to(dtype)
    assert_near(matmul.int8_mm(*x, *w, bias, dtype), exact(x, w, bias), torch.finfo(dtype).eps / 2 + FLOAT)
    y, _ = matmul.int8_mm_residual(*x, *w, bias, residual)
    assert y.dtype == dtype
    assert_near(y, gated(exact(x, w, bias), residual, None), torch.finfo(dtype).eps / 2 + FLOAT)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_quantized_output(m, n, k, gelu):
    x, w, bias = quantized("block", m, k, 0), quantized("block", n, k, 1), gaussian(n, seed=2)
    q, scale = matmul.int8_mm_quantize(*x, *w, bias, gelu)
    twin_q, twin_scale = reference.int8_mm_quantize(*x, *w, bias, gelu)
    assert_near(scale, twin_scale, FLOAT)
    # a value next to a tie may go the other way where float32 sums differ in their last bit
    assert (q.int() - twin_q.int()).abs().max() <= 1 and (q != twin_q).float().mean() < 1e-3
    expected = exact(x, w, bias, gelu)
    steps = int8._blocks(expected - int8.dequantize(q, scale, torch.float64)).abs() / scale[:, None, :, None]
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
    y, stats = matmul.int8_mm_residual(*x, *w, bias, residual, gate)
    assert y.dtype == torch.bfloat16
    assert_near(y, gated(exact(x, w, bias), residual, gate), HALF)
    for i in range(2):
        assert_near(stats[..., i], exact_stats(y)[..., i], FLOAT)
    alone, none = matmul.int8_mm_residual(*x, *w, bias, residual, gate, stats=False)
    assert none is None and torch.equal(alone, y)


@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_q_k_v_and_the_sums_of_their_squares(fmt, m, n, k):
    x, weights = quantized(fmt, m, k, 0), [quantized(fmt, n, k, 1 + i) for i in range(3)]
    biases = [gaussian(n, seed=7 + i) for i in range(3)]
    y, sums = matmul.int8_mm_qkv(*x, *zip(*weights), biases)
    for i in range(3):
        assert_near(y[i], exact(x, weights[i], biases[i]), HALF)
    for i in range(2):
        assert_near(sums[i], exact_squares(y[i]), FLOAT)
    plain, _ = matmul.int8_mm_qkv(*x, *zip(*weights), out_dtype=torch.float32)
    assert_near(plain[2], exact(x, weights[2]), FLOAT)


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
            matmul.int8_mm(*x, *weights[0], bias),
            *matmul.int8_mm_residual(*x, *weights[0], bias, residual, gate),
            *matmul.int8_mm_qkv(*x, *zip(*weights), [bias] * 3),
        ]

    expected = results()
    monkeypatch.setattr(int8_configs, "config", lambda *_: config)
    for y, twin in zip(results(), expected):
        assert_near(y, twin, HALF)


def test_a_k_that_tma_cannot_address_takes_pointers():
    x, w = quantized("block", 5, 200, 0), quantized("block", 64, 200, 1)
    config = int8_configs.DEFAULT._replace(variant="persistent")
    assert_near(int8_mm_kernel(*x, *w, out_dtype=torch.float32, config=config), exact(x, w), FLOAT)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_largest_products_are_exact(fmt):
    # 128 products of -128 and -128 are 2^21, half of what the conversion in registers holds
    x = torch.full((5, 384), -128, dtype=torch.int8)
    x[1::2] = 127
    w = torch.full((64, 384), -128, dtype=torch.int8)
    w[::3] = 127
    shapes = [(1, 3), (1, 3)] if fmt == "block" else [(5, 1), (64, 1)]
    y = matmul.int8_mm(x, torch.ones(shapes[0]), w, torch.ones(shapes[1]), out_dtype=torch.float32)
    assert torch.equal(y.long(), x.long() @ w.long().t())


def test_a_bad_number_stays_in_its_blocks():
    x, w = quantized("block", 248, 200, 0), quantized("block", 200, 200, 1)
    x[1][1, 0] = torch.nan
    y = matmul.int8_mm(*x, *w)
    assert y[128:].isnan().all() and y[:128].isfinite().all()
    _, scale = matmul.int8_mm_quantize(*x, *w)
    assert scale[1].isnan().all() and scale[0].isfinite().all()


def test_no_rows():
    x, w = quantized("block", 128, 128, 0), quantized("block", 64, 128, 1)
    y = matmul.int8_mm(x[0][:0], x[1][:0], *w)
    assert y.shape == (0, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fmt", FORMATS)
def test_int8_linear_takes_the_kernels_and_no_float_copy_of_the_weight(fmt, dtype, monkeypatch):
    x = gaussian(2, 400, 60).to(dtype).transpose(1, 2)[..., ::2]  # [2, 60, 200], no stride is 1
    w, bias = quantized(fmt, 130, 200, 1), gaussian(130, seed=2).to(dtype)
    with monkeypatch.context() as patch:
        patch.setattr(int8.quantize, "dequantize_block", lambda *_: pytest.fail("a float copy of the weight"))
        patch.setattr(matmul, "_torch_linear", lambda *_: pytest.fail("the torch path"))
        y = matmul.int8_linear(x, *w, bias)
    quantize = int8.quantize_block if fmt == "block" else int8.quantize_rows
    assert y.shape == (2, 60, 130) and y.dtype == dtype
    x_q = quantize(x.reshape(-1, 200).float())
    assert_near(y.flatten(0, 1), exact(x_q, w, bias), torch.finfo(dtype).eps / 2 + FLOAT)
    assert "Triton" in doctor.int8_path("cpu", fmt)


def test_gradients_take_the_torch_path():
    w, bias = quantized("row", 64, 200, 1), torch.zeros(64, requires_grad=True)
    x = quantized("row", 5, 200, 0)
    for y in (matmul.int8_linear(gaussian(5, 200), *w, bias), matmul.int8_mm(*x, *w, bias, torch.float32)):
        (gradient,) = torch.autograd.grad(y.sum(), bias)
        assert torch.equal(gradient, torch.full((64,), 5.0))


@pytest.mark.parametrize("tuned", [True, False])
def test_a_launch_that_fails_is_retried_as_shipped_or_explained(tuned, monkeypatch, caplog):
    tall = int8_configs.DEFAULT._replace(block_m=64)
    table = {"block plain short": tall} if tuned else {}
    run = launch._launch

    def failing(kernel, grid, arguments, options):
        if options.get("BLOCK_M") == 64 or (not tuned and "BLOCK_M" in options):
            raise RuntimeError("out of resource: shared memory\nsecond line")
        run(kernel, grid, arguments, options)

    monkeypatch.setattr(int8_configs, "tuned_table", lambda device: table)
    monkeypatch.setattr(launch, "_launch", failing)
    x, w = quantized("block", 5, 200, 0), quantized("block", 64, 200, 1)
    if not tuned:
        with pytest.raises(TurboError, match=r"int8_mm_kernel cannot run on cpu .*shared memory\).*TURBOWAN_KERNELS=t"):
            matmul.int8_mm(*x, *w)
        return
    for _ in range(2):
        assert_near(matmul.int8_mm(*x, *w), exact(x, w), HALF)
    assert len(caplog.records) == 1 and "tuned launch table" in caplog.text and not table


def test_memory_that_is_short_is_no_fault_of_the_kernel(monkeypatch):
    def short(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(launch, "_launch", short)
    with pytest.raises(torch.OutOfMemoryError):
        matmul.int8_mm(*quantized("block", 5, 200, 0), *quantized("block", 64, 200, 1))


def test_a_variant_of_fixed_depth_refuses_another():
    config = int8_configs.DEFAULT._replace(variant="persistent", depth=64)
    with pytest.raises(ValueError, match="128 deep"):
        int8_mm_kernel(*quantized("block", 5, 208, 0), *quantized("block", 64, 208, 1), config=config)
    with pytest.raises(ValueError):
        int8_configs._checked("block plain long", config)
