import pytest
import torch

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
from turbo_core import int8
from turbo_core.diagnostics import doctor
from turbo_core.errors import TurboError
from turbo_core.int8 import matmul, reference

HALF = torch.finfo(torch.bfloat16).eps / 2
FLOAT = 2e-6


@pytest.fixture(params=["whole", "slices", "float products"])
def way(request, monkeypatch):
    """The twins as a CPU computes them, one block of rows at a time, and as a device without fast int8 does."""
    if request.param == "slices":
        monkeypatch.setattr(reference, "SLICE", 1)
    if request.param == "float products":
        monkeypatch.setattr(reference, "_has_slow_passes", lambda _: True)
    return request.param


@pytest.mark.parametrize("m, n, k", SHAPES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_form_is_the_product_and_its_epilogue(fmt, m, n, k, way):
    half = HALF if way != "float products" else 4 * HALF  # operands in the result's own half precision
    x, weights = quantized(fmt, m, k, 0), [quantized(fmt, n, k, 1 + i) for i in range(3)]
    w, biases = weights[0], [gaussian(n, seed=7 + i) for i in range(3)]
    residual, gate = gaussian(m, n, seed=5).to(torch.bfloat16), gaussian(2 if m % 2 == 0 else 1, n, seed=6)

    assert_near(matmul.int8_mm(*x, *w, biases[0], torch.float32), exact(x, w, biases[0]), FLOAT)
    assert_near(matmul.int8_mm(*x, *w, gelu=True), exact(x, w, gelu=True), half)

    y, stats = matmul.int8_mm_residual(*x, *w, biases[0], residual, gate)
    assert_near(y, gated(exact(x, w, biases[0]), residual, gate), half)
    assert_near(stats, exact_stats(y), FLOAT)
    assert matmul.int8_mm_residual(*x, *w, None, residual, stats=False)[1] is None

    y, sums = matmul.int8_mm_qkv(*x, *zip(*weights), biases)
    for i in range(3):
        assert_near(y[i], exact(x, weights[i], biases[i]), half)
    assert_near(sums, torch.stack([exact_squares(y[0]), exact_squares(y[1])]), FLOAT)


@pytest.mark.parametrize("m, n, k", SHAPES)
def test_quantized_output_is_the_block_format_of_the_float_result(m, n, k, way):
    x, w, bias = quantized("block", m, k, 0), quantized("block", n, k, 1), gaussian(n, seed=2)
    q, scale = matmul.int8_mm_quantize(*x, *w, bias)
    expected_q, expected_scale = int8.quantize_block(exact(x, w, bias, gelu=True).float())
    assert_near(scale, expected_scale, FLOAT if way != "float products" else 8 * HALF)
    assert (q.int() - expected_q.int()).abs().max() <= (1 if way != "float products" else 3)


def test_where_both_formats_have_one_shape_they_mean_the_same():
    # K <= 128 and one output: [1, 1] is either; x in three blocks of rows is not in the row format
    x, w = quantized("block", 300, 100, 0), quantized("block", 1, 100, 1)
    assert_near(matmul.int8_mm(*x, *w, out_dtype=torch.float32), exact(x, w), FLOAT)


def test_strided_operands():
    x, w = quantized("block", 130, 200, 0), quantized("block", 64, 200, 1)
    strided = torch.empty(200, 130, dtype=torch.int8).t().copy_(x[0])
    residual = gaussian(64, 130, seed=2).t()
    assert torch.equal(matmul.int8_mm(strided, x[1], *w), matmul.int8_mm(*x, *w))
    y, _ = matmul.int8_mm_residual(*x, *w, None, residual)
    assert y.is_contiguous()
    assert_near(y, gated(exact(x, w), residual, None), FLOAT)


def test_no_rows():
    x, w = quantized("row", 2, 128, 0), quantized("row", 64, 128, 1)
    y, stats = matmul.int8_mm_residual(x[0][:0], x[1][:0], *w, None, torch.empty(0, 64))
    assert y.shape == (0, 64) and stats.shape == (1, 0, 2)


def operands(fmt="block"):
    return quantized(fmt, 130, 200, 0), quantized(fmt, 64, 200, 1), gaussian(64, seed=2)


@pytest.mark.parametrize("fmt", FORMATS)
def test_operators_are_well_formed(fmt):
    x, w, bias = operands(fmt)
    ops, residual, gate = torch.ops.turbowan, gaussian(130, 64), gaussian(2, 64)
    for args in ((bias, torch.bfloat16, True), (None, torch.float32, False)):
        torch.library.opcheck(ops.int8_mm.default, (*x, *w, *args))
    for args in ((bias, residual, gate, True), (None, residual, None, False)):
        torch.library.opcheck(ops.int8_mm_residual.default, (*x, *w, *args))
    for biases in ([bias] * 3, []):
        torch.library.opcheck(ops.int8_mm_qkv.default, (*x, [w[0]] * 3, [w[1]] * 3, biases, torch.bfloat16))
    if fmt == "block":
        torch.library.opcheck(ops.int8_mm_quantize.default, (*x, *w, bias, True))
    quantize = {"block": ops.quantize_block, "row": ops.quantize_rows}[fmt]
    torch.library.opcheck(quantize.default, (residual,))


def test_compiled_every_form_is_one_node():
    x, w, bias = operands()
    residual, graphs = gaussian(130, 64), []

    def forward(x, residual):
        x = int8.quantize_block(x)
        y, sums = matmul.int8_mm_qkv(*x, [w[0]] * 3, [w[1]] * 3, [bias] * 3)
        hidden = matmul.int8_mm_quantize(*x, *w, bias)
        return matmul.int8_mm(*x, *w, bias), *hidden, y, sums, *matmul.int8_mm_residual(*x, *w, bias, residual)

    x = gaussian(130, 200)
    compiled = torch.compile(forward, fullgraph=True, backend=lambda g, _: graphs.append(g.graph) or g)
    for ours, theirs in zip(compiled(x, residual), forward(x, residual)):
        assert torch.equal(ours, theirs)
    names = {str(node.target) for node in graphs[0].nodes if node.op == "call_function"}
    for name in ("quantize_block", "int8_mm_qkv", "int8_mm_quantize", "int8_mm", "int8_mm_residual"):
        assert any(f"turbowan.{name}" in target or f"turbowan::{name}" in target for target in names), names


def bad(change):
    """The operands of each form with one thing wrong in them."""
    x, w, bias = operands()
    given = {"x": x[0], "xs": x[1], "w": w[0], "ws": w[1], "bias": bias, "residual": gaussian(130, 64), "gate": None}
    given |= change
    head = tuple(given[name] for name in ("x", "xs", "w", "ws", "bias"))
    return head, given["residual"], given["gate"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": torch.zeros(130, 200)}, ("int8", "float32")),
        ({"w": torch.zeros(64, 199, dtype=torch.int8)}, ("200", "[64, 199]")),
        ({"xs": torch.ones(2, 3)}, ("[2, 2]", "[130, 1]", "[2, 3]")),
        ({"xs": torch.ones(2, 2, dtype=torch.float64)}, ("float32", "float64")),
        ({"xs": torch.ones(130, 1)}, ("one format", "[130, 1]", "[1, 2]")),
        ({"ws": torch.ones(2)}, ("float32 matrix", "[2]")),
        ({"bias": torch.ones(65)}, ("[64]", "[65]")),
        ({"bias": torch.ones(64, device="meta")}, ("cpu", "meta")),
        ({"w": torch.zeros(64, 200, dtype=torch.int8, device="meta")}, ("cpu", "meta")),
        ({"residual": torch.zeros(130, 65)}, ("[130, 64]", "[130, 65]")),
        ({"residual": torch.zeros(130, 64, dtype=torch.int32)}, ("float", "int32")),
        ({"gate": torch.ones(3, 64)}, ("multiple of the 3", "130")),
        ({"gate": torch.ones(1, 65)}, ("[1, 64]", "[1, 65]")),
        ({"gate": torch.ones(1, 64, dtype=torch.bfloat16)}, ("float32", "bfloat16")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_bad_operands_are_named_with_expected_and_got(change, words):
    head, residual, gate = bad(change)
    with pytest.raises(TurboError) as error:
        matmul.int8_mm_residual(*head, residual, gate)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_what_only_one_form_refuses():
    x, w, _ = operands("row")
    with pytest.raises(TurboError, match="block format"):
        matmul.int8_mm_quantize(*x, *w)
    with pytest.raises(TurboError, match=r"bfloat16, float16 or float32, got torch.int8"):
        matmul.int8_mm(*x, *w, out_dtype=torch.int8)
    with pytest.raises(TurboError, match=r"three each.*got 2, 2 and 3"):
        matmul.int8_mm_qkv(*x, [w[0]] * 2, [w[1]] * 2)
    with pytest.raises(TurboError, match="one shape"):
        matmul.int8_mm_qkv(*x, [w[0], w[0], w[0][:5]], [w[1], w[1], w[1][:5]])


def test_the_host_s_linear_computes_rows_where_it_is_there_and_kernels_are_not(monkeypatch):
    calls = []

    class Kitchen:
        @staticmethod
        def int8_linear(x, weight, scale, bias, out_dtype):
            calls.append((x, weight, scale, bias, out_dtype))
            return matmul._torch_linear(x, weight, scale, bias, True)

    monkeypatch.setattr(int8.quantize, "kitchen", lambda device: Kitchen)
    x, bias = gaussian(2, 5, 200).to(torch.bfloat16), gaussian(64).to(torch.bfloat16)
    for fmt in FORMATS:
        y = matmul.int8_linear(x, *quantized(fmt, 64, 200, 1), bias)
        assert y.shape == (2, 5, 64) and y.dtype == torch.bfloat16
    assert len(calls) == 1  # the block format is none of the host's
    given, _, scale, _, dtype = calls[0]
    assert torch.equal(given, x.flatten(0, 1)) and scale.shape == (64, 1) and dtype == torch.bfloat16
    matmul.int8_linear(x.double(), *quantized("row", 64, 200, 1))
    assert len(calls) == 1  # nor is float64


def test_the_path_of_a_linear_is_told_in_words(monkeypatch):
    for pays, words in ((True, "_int_mm"), (False, "float32 products")):
        monkeypatch.setattr(doctor, "int_mm_pays", lambda device, pays=pays: pays)
        assert words in doctor.int8_path("cpu", "block")
    monkeypatch.setattr(int8.paths, "why_not", lambda device, family: "Triton is not installed")
    for fmt in FORMATS:
        assert "Triton is not installed" in doctor.int8_path("meta", fmt)
    monkeypatch.setattr(int8.paths, "why_not", lambda device, family: None)
    assert "Triton" in doctor.int8_path("meta", "row")
