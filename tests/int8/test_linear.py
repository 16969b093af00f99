"""int8_linear is the published arithmetic; operands that do not fit are named."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.int8_reference import EXACT, FORMATS, gaussian, rounded
from turbo_core import int8
from turbo_core.errors import TurboError
from turbo_core.int8 import matmul, reference


def emulate(fmt, x, w, bias=None):
    """The published product in float64, from bf16-valued x [M, K] and w [N, K]: integer dots, both scales, bias."""
    (x, xs), (w, ws) = ((rounded(v), s.astype(np.float32).astype(float)) for v, s in map(EXACT[fmt], (x, w)))
    if fmt == "row":
        y = (x @ w.T) * xs * ws.T
    else:
        y = np.zeros((len(x), len(w)))
        for b in range(xs.shape[1]):
            here = slice(128 * b, 128 * b + 128)
            y += np.kron(xs[:, b : b + 1] * ws[None, :, b], np.ones((128, 128)))[: len(x), : len(w)] * (
                x[:, here] @ w[:, here].T
            )
    return y if bias is None else y + bias.double().numpy()


def assert_near(y, expected, tolerance=1e-6):
    y = y.double().numpy()
    assert y.shape == expected.shape
    assert np.abs(y - expected).max() <= tolerance * np.abs(expected).max()


LINEAR_SHAPES = [  # M, N, K
    (1, 128, 128),  # one row, whole blocks
    (5, 120, 127),  # everything under a block, K odd
    (129, 300, 129),  # everything just over
    (130, 1, 300),  # one output; K not a multiple of 8
    (17, 64, 1),  # one channel
    (300, 136, 1000),  # many K-blocks, the last ragged
]


@pytest.mark.parametrize("m, n, k", LINEAR_SHAPES)
@pytest.mark.parametrize("fmt, device", [("block", "cpu"), ("block", "others"), ("row", "cpu")])
def test_int8_linear_is_the_published_arithmetic(fmt, device, m, n, k, monkeypatch):
    monkeypatch.setattr(reference, "_has_slow_passes", lambda _: device == "others")
    x, w, bias = (gaussian(*s, seed=i, dtype=torch.bfloat16).float() for i, s in enumerate([(m, k), (n, k), (n,)]))
    x[m // 2 :] *= 8  # scales that differ between blocks, or they could be mixed up unseen
    w[:, k // 2 :] *= 4
    w_q, w_scale = FORMATS[fmt](w)
    assert_near(matmul.int8_linear(x, w_q, w_scale), emulate(fmt, x, w))
    assert_near(matmul.int8_linear(x, w_q, w_scale, bias), emulate(fmt, x, w, bias))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_int8_linear_in_half_precision_rounds_once_at_the_end(fmt, dtype):
    x, w, bias = (gaussian(*s, seed=i, dtype=dtype) for i, s in enumerate([(140, 300), (130, 300), (130,)]))
    y = matmul.int8_linear(x, *FORMATS[fmt](w), bias)
    assert y.dtype == dtype
    assert_near(y, emulate(fmt, x, w, bias), torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_float_product_in_half_precision_adds_less_than_its_output_rounding(dtype, monkeypatch):
    monkeypatch.setattr(reference, "_has_slow_passes", lambda _: True)
    x, w, bias = (gaussian(*s, seed=i, dtype=dtype) for i, s in enumerate([(140, 300), (130, 300), (130,)]))
    y = matmul.int8_linear(x, *int8.quantize_block(w), bias)
    assert y.dtype == dtype
    expected = torch.as_tensor(emulate("block", x, w, bias), dtype=torch.float64)
    assert ((y.double() - expected).norm() / expected.norm()).item() < torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("fmt", FORMATS)
def test_int8_linear_does_not_saturate_at_the_largest_products(fmt):
    # int8 dot instructions with 16-bit intermediates give wrong sums here
    x, w = torch.ones(20, 4096), -torch.ones(24, 4096)
    x[::2] *= -1
    assert_near(matmul.int8_linear(x, *FORMATS[fmt](w)), emulate(fmt, x, w))


@pytest.mark.parametrize("fmt", FORMATS)
def test_batch_axes_are_rows(fmt):
    # 2 x 70 rows: in the block format the second block of 128 rows lies wholly in the second sample
    x, w = gaussian(2, 70, 200, dtype=torch.bfloat16).float(), gaussian(96, 200, seed=1, dtype=torch.bfloat16).float()
    x[1] *= 16
    y = matmul.int8_linear(x, *FORMATS[fmt](w))
    assert y.shape == (2, 70, 96)
    assert_near(y.flatten(0, 1), emulate(fmt, x.flatten(0, 1), w))
    assert torch.equal(matmul.int8_linear(x[0, 0], *FORMATS[fmt](w)), matmul.int8_linear(x[:1, 0], *FORMATS[fmt](w))[0])


@pytest.mark.parametrize("fmt", FORMATS)
def test_strided_activations_and_weights(fmt):
    x, (w_q, w_scale) = gaussian(200, 150), FORMATS[fmt](gaussian(130, 200, seed=1))
    plain = matmul.int8_linear(x.t().contiguous(), w_q, w_scale)
    assert torch.equal(matmul.int8_linear(x.t(), w_q, w_scale), plain)
    strided = torch.empty(200, 130, dtype=torch.int8).t().copy_(w_q)
    assert not strided.is_contiguous() and torch.equal(matmul.int8_linear(x.t(), strided, w_scale), plain)
    wide = gaussian(2, 9, 400)
    assert torch.equal(
        matmul.int8_linear(wide[..., ::2], w_q, w_scale), matmul.int8_linear(wide[..., ::2].clone(), w_q, w_scale)
    )


@pytest.mark.parametrize("shape", [(0, 200), (2, 0, 200), (0, 3, 200)])
@pytest.mark.parametrize("fmt", FORMATS)
def test_no_rows_give_no_rows(fmt, shape):
    y = matmul.int8_linear(torch.zeros(shape), *FORMATS[fmt](gaussian(130, 200)), torch.ones(130))
    assert y.shape == (*shape[:-1], 130)


@pytest.mark.parametrize("fmt", FORMATS)
def test_error_against_the_float_linear_is_the_quantization_noise(fmt):
    x, w = gaussian(256, 1024), gaussian(256, 1024, seed=1)

    def relative(a, b):
        return ((a - b).norm() / b.norm()).item()

    noise = sum(relative(int8.dequantize(*FORMATS[fmt](t)), t) ** 2 for t in (x, w)) ** 0.5
    assert 0.009 < noise < 0.015
    assert relative(matmul.int8_linear(x, *FORMATS[fmt](w)), F.linear(x, w)) == pytest.approx(noise, rel=0.05)


def test_one_output_of_one_block_means_the_same_in_both_formats():
    x, w = gaussian(40, 100), gaussian(1, 100, seed=1)
    for quantize in FORMATS.values():
        y = matmul.int8_linear(x, *quantize(w))
        assert (y - F.linear(x, w)).norm() < 0.02 * y.norm()


def test_the_product_for_devices_without_int8_matmul_is_exact(monkeypatch):
    # K of the 14B model's ffn.2: float32 holds sums of 1024 products exactly, 13824 of them at once lose low bits
    a, b = torch.randint(64, 128, (2, 40, 13824), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    exact = (a.long() @ b.long().t()).double()
    monkeypatch.setattr(int8.quantize, "int_mm_pays", lambda device: True)
    torch.testing.assert_close(reference._int_mm(a, b).double(), exact, rtol=0, atol=0)
    monkeypatch.setattr(int8.quantize, "has_int_mm", lambda device: False)
    torch.testing.assert_close(reference._int_mm(a, b).double(), exact, rtol=4 * 2**-24, atol=0)
    a, b = a[:, :1000], b[:, :1000]
    assert torch.equal(reference._int_mm(a, b).long(), a.long() @ b.long().t())


@pytest.mark.parametrize("has_int_mm", [True, False])
@pytest.mark.parametrize("fmt", FORMATS)
def test_working_in_slices_changes_no_bit(fmt, has_int_mm, monkeypatch):
    monkeypatch.setattr(int8.quantize, "has_int_mm", lambda device: has_int_mm)
    monkeypatch.setattr(int8.quantize, "int_mm_pays", lambda device: True)
    x, bias = gaussian(2, 200, 300, dtype=torch.bfloat16), gaussian(130, seed=2, dtype=torch.bfloat16)
    x[1] *= 16
    weight = FORMATS[fmt](gaussian(130, 300, seed=1))
    rows, product = [], {"block": "_mm_block", "row": "_mm_rows"}[fmt]
    multiply = getattr(reference, product)
    monkeypatch.setattr(reference, product, lambda x_q, *args: rows.append(len(x_q)) or multiply(x_q, *args))
    whole = matmul.int8_linear(x, *weight, bias)
    assert rows == [400]
    for size in (1, 300 * 256):  # one block of rows at a time; two, then a ragged rest
        monkeypatch.setattr(reference, "SLICE", size)
        rows.clear()
        assert torch.equal(matmul.int8_linear(x, *weight, bias), whole)
        assert rows == ([128, 128, 128, 16] if size == 1 else [256, 144])


@pytest.mark.parametrize("fmt", FORMATS)
def test_compiled_it_is_one_node_with_the_same_result(fmt):
    x, weight, graphs = gaussian(2, 70, 300), FORMATS[fmt](gaussian(130, 300, seed=1)), []
    compiled = torch.compile(
        lambda x: matmul.int8_linear(x, *weight), fullgraph=True, backend=lambda g, _: graphs.append(g.graph) or g
    )
    assert torch.equal(compiled(x), matmul.int8_linear(x, *weight))
    calls = [node.target for node in graphs[0].nodes if node.op == "call_function"]
    assert torch.ops.turbowan.int8_linear in [getattr(call, "overloadpacket", call) for call in calls]
    assert len(calls) < 10
    torch.library.opcheck(torch.ops.turbowan.int8_linear.default, (x[0], *weight, None))


# ---- bad input

W, S = torch.zeros(300, 200, dtype=torch.int8), torch.ones(3, 2)
X = torch.zeros(4, 200)


@pytest.mark.parametrize(
    "args, words",
    [
        ((torch.zeros(4, 199), W, S), ("199", "200")),
        ((X, W.float(), S), ("int8", "float32")),
        ((X, W[None], S), ("[N, K]", "[1, 300, 200]")),
        ((X, W, torch.ones(2, 3)), ("[3, 2]", "[300, 1]", "[2, 3]")),
        ((X, W, torch.ones(300)), ("[300, 1]", "[300]")),
        ((X, W, torch.tensor(1.0)), ("[300, 1]", "[]")),
        ((X, W, S, torch.zeros(299)), ("[300]", "[299]")),
        ((X, W, S, torch.zeros(1)), ("[300]", "[1]")),
        ((X.to(torch.int8), W, S), ("float", "int8")),
        ((X.to(torch.int8), W, torch.ones(300, 1)), ("float", "int8")),
    ],
)
def test_int8_linear_names_what_it_expected_and_got(args, words):
    with pytest.raises(TurboError) as error:
        matmul.int8_linear(*args)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("quantize", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("x", [torch.zeros(5), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int32)], ids=str)
def test_only_float_matrices_are_quantized(quantize, x):
    with pytest.raises(TurboError, match=r"\[M, K\]"):
        quantize(x)


@pytest.mark.parametrize("decode, scale", [(int8.dequantize_block, (300, 1)), (int8.dequantize_rows, (3, 2))])
def test_a_scale_of_the_other_format_is_refused(decode, scale):
    with pytest.raises(TurboError) as error:
        decode(W, torch.ones(scale))
    assert str(list(scale)) in str(error.value)
    with pytest.raises(TurboError):
        decode(W, torch.ones(3, 3))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight_scale": torch.ones(64, 1, dtype=torch.int32)}, "scale of the weight must be float, got torch.int32"),
        ({"weight_scale": torch.ones(64, 1, device="meta")}, "scale of the weight must be on cpu as x is, got on meta"),
        ({"weight_q": torch.ones(64, 200, dtype=torch.int8, device="meta")}, "the weight must be on cpu"),
        ({"bias": torch.ones(64, device="meta")}, "bias must be on cpu"),
        ({"bias": torch.ones(64, dtype=torch.int32)}, r"bias must be float \[64\], got torch.int32"),
    ],
)
def test_operands_are_checked_before_any_launch(change, message):
    weight_q, weight_scale = int8.quantize_rows(gaussian(64, 200))
    given = {"x": gaussian(5, 200), "weight_q": weight_q, "weight_scale": weight_scale, "bias": torch.ones(64)}
    with pytest.raises(TurboError, match=message):
        matmul.int8_linear(**given | change)


@pytest.mark.parametrize("fmt", FORMATS)
def test_scales_in_half_precision_are_read_as_float32(fmt):
    x, (q, scale) = gaussian(5, 200), FORMATS[fmt](gaussian(64, 200, seed=1))
    scale = scale.bfloat16()
    assert torch.equal(matmul.int8_linear(x, q, scale), matmul.int8_linear(x, q, scale.float()))


def test_rows_are_written_where_they_are_wanted():
    x = gaussian(5, 200)
    q, scale = torch.zeros(9, 200, dtype=torch.int8), torch.zeros(9, 1)
    out = int8.quantize_rows(x, out=(q[2:7], scale[2:7]))
    for whole, part, expected in zip((q, scale), out, int8.quantize_rows(x)):
        assert part.data_ptr() == whole[2:].data_ptr() and torch.equal(whole[2:7], expected)
        assert not whole[:2].any() and not whole[7:].any()
    with pytest.raises(TurboError, match=r"out must be contiguous torch\.int8"):
        int8.quantize_rows(x, out=(q[:4], scale[:5]))
