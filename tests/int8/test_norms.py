import pytest
import torch
import torch.nn.functional as F

from turbo_core.errors import TurboError
from turbo_core.int8 import dequantize, norm, reference

EPS = 1e-6


@pytest.fixture(autouse=True)
def torch_path(monkeypatch):
    monkeypatch.setattr(norm, "use_triton", lambda device, family: False)


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(m=300, k=200, groups=3):
    # ragged rows and columns; groups of 100 rows, which blocks of 128 straddle
    x = gaussian(m, k, dtype=torch.bfloat16) + gaussian(m, 1, seed=1, dtype=torch.bfloat16)
    vectors = {"weight": gaussian(k, seed=2), "bias": gaussian(k, seed=3)}
    return x, vectors | {"shift": gaussian(groups, k, seed=4), "scale": gaussian(groups, k, seed=5)}


def exact(x, weight, bias, shift, scale):
    y = F.layer_norm(x.double(), x.shape[1:], weight.double(), bias.double(), EPS)
    times = len(x) // len(shift)
    return y * (1 + scale.repeat_interleave(times, 0)) + shift.repeat_interleave(times, 0)


@pytest.mark.parametrize("slice_size", [1, reference.SLICE], ids=["slices of a block", "one slice"])
@pytest.mark.parametrize("given", [False, True], ids=["own statistics", "given statistics"])
@pytest.mark.parametrize("rows", [False, True], ids=["block", "row"])
def test_layer_norm_quantize(rows, given, slice_size, monkeypatch):
    monkeypatch.setattr(reference, "SLICE", slice_size)
    x, vectors = operands()
    y = exact(x, **vectors)
    stats = norm.row_stats(x) if given else None
    q, scale = norm.layer_norm_quantize(x, EPS, **vectors, stats=stats, rows=rows)
    assert scale.shape == ((300, 1) if rows else (3, 2)) and q.dtype == torch.int8
    if rows:
        step = y.abs().amax(1, keepdim=True) / 127
    else:
        padded = F.pad(y, (0, 56, 0, 84)).abs()
        step = padded.unflatten(0, (3, 128)).unflatten(2, (2, 128)).amax((1, 3)) / 128
    torch.testing.assert_close(scale.double(), step, rtol=1e-5, atol=0)
    if not rows:
        step = step.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
    off = (dequantize(q, scale) - y).abs() / step
    assert off.max() <= (0.501 if rows else 1.001)  # +128 becomes 127
    assert (off > 0.501).sum() <= scale.numel()


def test_row_stats_of_ragged_spans():
    x = gaussian(130, 300) * 3 + 100
    stats = norm.row_stats(x)
    assert stats.shape == (3, 130, 2)
    for span, part in zip(stats.double(), x.double().split(128, 1)):
        torch.testing.assert_close(span[:, 0], part.mean(1), rtol=1e-6, atol=0)
        squares = (part - part.mean(1, keepdim=True)).square().sum(1)
        torch.testing.assert_close(span[:, 1], squares, rtol=1e-4, atol=0)


def test_rms_norm_rounds_once():
    x, vectors = operands()
    y = norm.rms_norm(x, vectors["weight"], EPS)
    expected = F.rms_norm(x.float(), (200,), vectors["weight"], EPS).to(torch.bfloat16)
    assert torch.equal(y, expected)


def test_no_rows():
    x = torch.zeros(0, 256)
    assert [t.shape for t in norm.layer_norm_quantize(x, EPS)] == [(0, 256), (0, 2)]
    assert norm.row_stats(x).shape == (2, 0, 2) and norm.rms_norm(x, x.new_ones(256), EPS).shape == (0, 256)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 4)}, "x must be a float16, bfloat16 or float32 matrix .* got torch.float32 .2, 3, 4."),
        ({"x": torch.zeros(300, 200, dtype=torch.int8)}, "got torch.int8"),
        ({"weight": torch.zeros(199)}, r"weight must be float \[200\], got torch.float32 \[199\]"),
        ({"bias": torch.zeros(200, dtype=torch.int32)}, "bias must be float"),
        ({"shift": torch.zeros(2, 200)}, r"scale must be float \[2, 200\], got torch.float32 \[3, 200\]"),
        ({"shift": None, "scale": torch.zeros(7, 200)}, "a multiple of the 7 rows of scale, got 300"),
        ({"shift": torch.zeros(200)}, "shift must be float"),
        ({"stats": torch.zeros(2, 200, 2)}, r"stats must be float \[2, 300, 2\]"),
        ({"stats": torch.zeros(2, 300, 2, dtype=torch.float64)}, "stats must be float32"),
        ({"weight": torch.zeros(200, device="meta")}, "weight must be on cpu as x is, got on meta"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    x, vectors = operands()
    with pytest.raises(TurboError, match=message):
        norm.layer_norm_quantize(**({"x": x, "eps": EPS} | vectors | change))


def test_rms_norm_and_row_stats_refuse_what_does_not_fit():
    with pytest.raises(TurboError, match=r"weight must be float \[4\]"):
        norm.rms_norm(torch.zeros(2, 4), torch.zeros(5), EPS)
    with pytest.raises(TurboError, match="row_stats: x must be"):
        norm.row_stats(torch.zeros(4))


def test_operators():
    x, vectors = operands()
    ops = torch.ops.turbowan
    for op, args in (
        (ops.row_stats, (x,)),
        (ops.rms_norm, (x, vectors["weight"], EPS)),
        (ops.layer_norm_quantize, (x, EPS, *vectors.values(), None, False)),
        (ops.layer_norm_quantize, (x, EPS, None, None, None, None, norm.row_stats(x), False)),
        (ops.layer_norm_quantize, (x, EPS, None, None, None, None, None, True)),
    ):
        torch.library.opcheck(op, args)


def test_one_graph_under_torch_compile():
    x, vectors = operands()

    def chain(x):
        q, scale = norm.layer_norm_quantize(x, EPS, **vectors, stats=norm.row_stats(x))
        return q, scale, norm.rms_norm(x, vectors["weight"], EPS)

    compiled = torch.compile(chain, backend="aot_eager", fullgraph=True, dynamic=True)
    for a, b in zip(compiled(x), chain(x)):
        assert torch.equal(a, b)


def test_statistics_have_gradients():
    x = gaussian(5, 200).requires_grad_()
    norm.row_stats(x).sum().backward()
    assert x.grad.isfinite().all() and x.grad.any()


def test_no_columns():
    assert norm.row_stats(torch.zeros(3, 0)).shape == (0, 3, 2)
    assert norm.rms_norm(torch.zeros(3, 0), torch.zeros(0), EPS).shape == (3, 0)
