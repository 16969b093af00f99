"""Whole sparse-linear attention through the kernels against the torch twin; runs under TRITON_INTERPRET=1."""

import pytest
import torch

from tests.kernels.poison import poisoned
from tests.triton_cpu.interpreter import repair

repair()

from tests.kernels.sla_attends import recorded  # noqa: E402
from turbo_core import sla  # noqa: E402
from turbo_core.int8 import dequantize_block  # noqa: E402
from turbo_core.sla import fast, reference  # noqa: E402
from turbo_core.wan import WanModel  # noqa: E402


@pytest.fixture
def poison():
    with poisoned():
        yield


@pytest.fixture
def launched(monkeypatch, poison):
    """One entry for each attention that the kernels computed."""
    return recorded(monkeypatch)


def draw(length, keys=None, b=1, h=2, d=64, dtype=torch.float32, seed=0):
    """q, k, v as models have them: a common key offset, channels of different size, heads of different sharpness."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, n, h, d, generator=generator) for n in (length, keys or length, keys or length))
    q *= torch.linspace(0.5, 2, h)[:, None]
    k += 3 * torch.randn(1, 1, h, d, generator=generator)
    v *= torch.logspace(-1, 1, d)
    return [x.to(dtype) for x in (q, k, v)]


def projection(d, seed=9):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d, d, generator=generator) / d**0.5, torch.randn(d, generator=generator)


def twin(q, k, v, proj, topk, precision, coverage=None):
    return reference.sparse_linear(q, k, v, *proj, topk, coverage, 128, 64, precision)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# float32 shows what the kernels do differently; bf16 adds the rounding of the two results
TOLERANCE = {
    ("bf16", torch.float32): 1e-3,
    ("bf16", torch.bfloat16): 6e-3,
    ("int8", torch.float32): 2e-2,
    ("int8", torch.bfloat16): 2e-2,
    ("bf16", torch.float16): 1e-3,
    ("int8", torch.float16): 2e-2,
}


# 130 tokens: two query blocks, the second of two tokens, three key blocks, the last of two; 200: ragged in both
FORMS = [
    (2, 130, 64, 0.1, None, torch.float32, True),
    (1, 200, 128, 0.5, None, torch.bfloat16, True),
    (1, 200, 64, 0.5, None, torch.float16, False),
    (1, 130, 128, 1.0, None, torch.float32, True),
    (1, 130, 64, 1.0, None, torch.float32, False),
    (2, 200, 64, 0.1, 0.5, torch.float32, True),
]


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("b, length, d, topk, coverage, dtype, linear", FORMS)
def test_agrees_with_the_twin(launched, b, length, d, topk, coverage, dtype, linear, precision):
    q, k, v = draw(length, b=b, h=128 // d, d=d, dtype=dtype)
    proj = projection(d) if linear else (None, None)
    out = sla.sparse_linear_attention(q, k, v, *proj, topk, precision=precision, coverage=coverage)
    assert out.dtype == dtype and out.shape == q.shape
    error = relative(out, twin(q, k, v, proj, topk, precision, coverage))
    print(f"{precision} {dtype} L {length} D {d} top-k {topk} coverage {coverage} linear {linear}: {error:.2e}")
    assert error < TOLERANCE[precision, dtype]
    dense_by_torch = topk == 1.0 and precision == "bf16" and not linear
    assert len(launched) == (0 if dense_by_torch else 1)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_two_runs_are_bit_identical(precision):
    given = *draw(200, dtype=torch.bfloat16), *projection(64), 0.5
    a, b = (sla.sparse_linear_attention(*given, precision=precision) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.usefixtures("poison")
def test_below_fp8_values_are_float16(monkeypatch):
    q, k, v = draw(130, h=1, d=128, dtype=torch.bfloat16)
    expected = twin(q.float(), k.float(), v.float(), projection(128), 0.5, "bf16")
    errors = []
    for fp8 in (True, False):
        monkeypatch.setattr(fast, "has_fp8", lambda device, fp8=fp8: fp8)
        out = sla.sparse_linear_attention(q, k, v, *projection(128), 0.5, precision="int8")
        errors.append(relative(out, expected))
    assert errors[1] < 0.75 * errors[0] < 2e-2


def test_strided_views_and_other_keys_than_queries(launched):
    q, k, v = draw(130, 200)
    packed = torch.randn(2, 130, 3, 2, 64, generator=torch.Generator().manual_seed(1))
    packed[:, :, 2] += 1  # values without a mean would leave little but rounding
    by_channel = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    for given, precision, coverage in (
        ((q, k, v), "int8", 0.6),
        (packed.unbind(2), "bf16", None),
        (packed.unbind(2), "int8", None),
        (by_channel, "bf16", 0.6),
    ):
        out = sla.sparse_linear_attention(*given, None, None, 0.5, precision=precision, coverage=coverage)
        expected = twin(*given, (None, None), 0.5, precision, coverage)
        assert relative(out, expected) < TOLERANCE[precision, torch.float32]
    assert len(launched) == 4


def raw(b, length, h, d, dtype, partials=2):
    generator = torch.Generator().manual_seed(4)
    qkv = (3 * torch.randn(3, b, length, h, d, generator=generator) + 1).to(dtype)
    parts = qkv[:2].double().square().flatten(3).flatten(1, 2).chunk(partials, -1)
    sums = torch.stack([part.sum(-1) for part in parts], 1).float()
    weights = [1 + 0.3 * torch.randn(h * d, generator=generator) for _ in range(2)]
    angles = 6 * torch.rand(length, d // 2, generator=generator)
    return qkv, sums, *weights, 1e-2, angles.cos(), angles.sin()


# batch 2 of whole query blocks and one ragged sample write the int8 output themselves; the others cannot
@pytest.mark.parametrize(
    "b, length, d, topk, precision",
    [
        (1, 130, 128, 0.5, "int8"),
        (2, 128, 128, 1.0, "bf16"),
        (2, 130, 64, 0.5, "int8"),
    ],
)
def test_from_qkv_with_and_without_its_own_quantization(launched, monkeypatch, b, length, d, precision, topk):
    qkv, sums, *rest = raw(b, length, 2, d, torch.bfloat16)
    call = *rest, *projection(d), topk, precision
    o = sla.sla_from_qkv(qkv, sums, *call).view(b * length, -1)
    outs = [o, dequantize_block(*sla.sla_from_qkv(qkv, None, *call, quantize=True))]
    assert len(launched) == 2
    monkeypatch.setattr(sla, "use_triton", lambda *_: False)
    expected = sla.sla_from_qkv(qkv.float(), sums, *rest, *projection(d), topk, precision).view(b * length, -1)
    assert len(launched) == 2
    errors = [relative(o, expected) for o in outs]
    print(f"raw {precision} B {b} L {length} D {d} top-k {topk}:", " ".join(f"{e:.1e}" for e in errors))
    assert max(errors) < 2e-2
    assert errors[0] < TOLERANCE[precision, torch.bfloat16]


# a bad number reaches the query blocks that keep its key block (k: forced by cumulative score's own blocks)
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    "which, bad, precision",
    [
        ("q", torch.nan, "int8"),
        ("k", torch.nan, "int8"),
        ("k", torch.inf, "bf16"),
        ("v", torch.inf, "int8"),
        ("v", torch.nan, "bf16"),
    ],
)
def test_a_bad_number_stays_where_it_is_in_the_twin(which, bad, precision):
    q, k, v = draw(300)
    {"q": q, "k": k, "v": v}[which][0, 200, 0, 5] = bad
    out = sla.sparse_linear_attention(q, k, v, None, None, 0.4, precision=precision, coverage=0.4)
    expected = twin(q, k, v, (None, None), 0.4, precision, 0.4)
    for x in (out, expected):
        blocks = torch.nn.functional.pad(x.isfinite().all(-1), (0, 0, 0, 84), value=True).unflatten(1, (3, 128)).all(2)
        if which == "v":
            index, counts = sla.covering_map(q, k, 0.4)
            kept = torch.tensor([[3 in row[:n] for row, n in zip(*head)] for head in zip(index[0], counts[0])])
            assert kept[0].any()
            assert torch.equal(blocks[0], ~torch.stack([kept[0], torch.zeros(3, dtype=torch.bool)], 1))
        else:
            assert blocks[0].tolist() == [[True, True], [False, True], [True, True]]
    assert relative(out[:, :, 1], expected[:, :, 1]) < TOLERANCE[precision, torch.float32]  # the other head


def test_one_node_under_compile_and_sound_operators():
    (q, k, v), proj = draw(65, h=1), projection(64)

    def attend(q, k, v):
        return sla.sparse_linear_attention(q, k, v, *proj, 0.5, precision="int8")

    assert torch.equal(torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v), attend(q, k, v))
    ops, checks = torch.ops.turbowan, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.sparse_linear_attention.default, (q, k, v, *proj, 0.5, None, 128, 64, "int8"))
    given = *raw(1, 65, 1, 128, torch.float32), *projection(128), 0.5, None, "int8"
    torch.library.opcheck(ops.sla_from_qkv.default, given, test_utils=checks)
    torch.library.opcheck(ops.sla_from_qkv_quantized.default, given, test_utils=checks)


def test_what_learns_stays_in_torch(launched):
    q, k, v = draw(130)
    q.requires_grad_()
    sla.sparse_linear_attention(q, k, v, *projection(64), 0.5).sum().backward()
    assert q.grad.abs().sum() > 0 and not launched
    with torch.no_grad():
        sla.sparse_linear_attention(q, k, v, *projection(64), 0.5)
    assert len(launched) == 1


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_whole_model(launched, monkeypatch, precision):
    torch.manual_seed(0)
    model = WanModel(64, 128, 1, 2, text_dim=32, freq_dim=32, sla=True).eval().requires_grad_(False)
    for block in model.blocks:
        block.self_attn.norm_q.weight *= 3  # else attention is nearly even, and any would do
    given = torch.randn(1, 16, 3, 14, 14), torch.tensor([900.0]), torch.randn(1, 8, 32)  # 147 tokens
    out = model(*given, topk=0.7, precision=precision)
    assert len(launched) == 2
    monkeypatch.setattr(sla, "use_triton", lambda *_: False)
    error = relative(out, model(*given, topk=0.7, precision=precision))
    assert len(launched) == 2
    print(f"whole model {precision}: {error:.1e}")
    assert 0 < error < (1e-5 if precision == "bf16" else 1e-3)
    assert relative(out, model(*given, topk=0.4, precision=precision)) > 10 * error
