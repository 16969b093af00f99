"""Cross-attention through the kernel against float64 and its twin; runs under TRITON_INTERPRET=1."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.poison import poisoned
from tests.triton_cpu.interpreter import repair

repair()

from turbo_core.cross import cross_attention  # noqa: E402

from turbo_core.dispatch import without_kernels  # noqa: E402
from turbo_core.int8 import dequantize_block  # noqa: E402
from turbo_core.kernels import cross_attention, sla_attention  # noqa: E402

EPS = 1e-6
# (L, keys, B, H, D): one token and one key; a batch, ragged in both; whole blocks; heads of 64, more keys than queries
SHAPES = [(1, 1, 1, 1, 128), (130, 77, 2, 2, 128), (128, 128, 2, 1, 128), (63, 200, 1, 3, 64)]


@pytest.fixture(autouse=True)
def poison():
    with poisoned():
        yield


def draw(length, keys, b, h, d, dtype=torch.float32, seed=0):
    """q before its norm, with tokens and channels of different size; k and v of a text; the norm's weight."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(b, n, h, d, generator=generator) for n in (length, keys, keys))
    q = q * torch.logspace(-1, 1, length)[:, None, None]
    q[..., 7] *= 10
    weight = 1 + 0.3 * torch.randn(h * d, generator=generator)
    return *(x.to(dtype) for x in (q, k + 0.5, v + 0.2)), weight


def exact(q, k, v, weight):
    q, k, v = (x.double() for x in (q, k, v))
    if weight is not None:
        q = F.rms_norm(q.flatten(2), weight.shape, weight.double(), EPS).view_as(q)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture
def launched(monkeypatch):
    calls, real = [], sla_attention.attention
    monkeypatch.setattr(cross_attention, "attention", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    return calls


@pytest.mark.parametrize("form", ["normed", "sums", "no sums"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, form):
    q, k, v, weight = draw(*shape)
    given = {} if form == "normed" else {"norm_weight": weight}
    if form == "sums":
        halves = q.flatten(2).flatten(0, 1).chunk(2, 1)
        given["sums"] = torch.stack([half.square().sum(1) for half in halves])
    out = cross_attention.cross_attention(q, k, v, eps=EPS, **given)
    assert relative(out, exact(q, k, v, given.get("norm_weight"))) < 1e-5


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_function_of_the_library_takes_the_kernel_and_agrees_with_its_twin(dtype, quantize, launched):
    for shape in SHAPES[1:]:  # with int8 output: a batch of ragged rows, of whole blocks, heads of 64
        q, k, v, weight = draw(*shape, dtype=dtype)
        ours = cross_attention(q, k, v, norm_weight=weight, quantize=quantize)
        launches = len(launched)
        with without_kernels():
            theirs = cross_attention(q, k, v, norm_weight=weight, quantize=quantize)
        assert launches and len(launched) == launches
        again = cross_attention(q, k, v, norm_weight=weight, quantize=quantize)
        if quantize:
            assert torch.equal(again[0], ours[0]) and torch.equal(again[1], ours[1])
            assert [t.shape for t in ours] == [t.shape for t in theirs] and ours[0].dtype == torch.int8
            ours, theirs = dequantize_block(*ours), dequantize_block(*theirs)
        else:
            assert torch.equal(again, ours) and ours.dtype == dtype and ours.is_contiguous()
        step = 0.02 if quantize else {torch.bfloat16: 6e-3, torch.float16: 8e-4}[dtype]
        assert relative(ours, theirs) < step
        assert relative(ours.view(q.shape), exact(q, k, v, weight)) < step


def test_strided_queries():
    q, k, v, weight = draw(65, 70, 2, 2, 64)
    wide = torch.cat([q, q], 1)[:, :65]  # samples further apart than they are long
    apart = torch.stack([q, q], 3)[:, :, :, 0]  # heads that do not lie side by side: copied
    out = cross_attention(q, k, v, norm_weight=weight)
    assert torch.equal(cross_attention(wide, k, v, norm_weight=weight), out)
    assert torch.equal(cross_attention(apart, k, v, norm_weight=weight), out)
    with pytest.raises(ValueError, match="side by side"):
        cross_attention.square_sums(apart)


def test_what_the_kernel_has_no_form_for_is_computed_by_torch(launched):
    for d, dtype in ((32, torch.float32), (128, torch.float64)):
        q, k, v, weight = draw(20, 10, 1, 2, d, dtype)
        assert relative(cross_attention(q, k, v, norm_weight=weight), exact(q, k, v, weight)) < 1e-5
    q, k, v, _ = draw(20, 10, 1, 2, 64)
    cross_attention(q, k.requires_grad_(), v).sum().backward()  # training
    assert k.grad is not None and not launched


def test_a_bad_number_stays_in_its_row():
    q, k, v, weight = draw(130, 70, 1, 2, 64)
    q[0, 5, 1, 3] = torch.nan
    finite = cross_attention(q, k, v, norm_weight=weight).isfinite().all(-1)[0]
    assert not finite[5].any() and finite[:5].all() and finite[6:].all()  # the norm goes over both heads


def test_sums_without_a_weight_are_refused():
    q, k, v, _ = draw(5, 5, 1, 1, 64)
    with pytest.raises(ValueError, match="without"):
        cross_attention.cross_attention(q, k, v, sums=torch.zeros(1, 5))
