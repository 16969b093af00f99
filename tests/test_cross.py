import pytest
import torch
import torch.nn.functional as F

from turbo_core.cross import cross_attention
from turbo_core.errors import TurboError
from turbo_core.int8 import quantize_block


def draw(length=70, keys=20, b=2, h=2, d=64, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(b, n, h, d, generator=generator).to(dtype) for n in (length, keys, keys))
    return 3 * q, k, v, 1 + 0.2 * torch.randn(h * d, generator=generator)


def dense(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def test_without_a_weight_it_is_attention():
    q, k, v, _ = draw()
    out = cross_attention(q, k, v)
    assert out.is_contiguous()
    torch.testing.assert_close(out, dense(q, k, v))


def test_the_norm_goes_over_the_full_width():
    q, k, v, weight = draw()
    normed = F.rms_norm(q.flatten(2), weight.shape, weight, 1e-6).view_as(q)
    torch.testing.assert_close(cross_attention(q, k, v, norm_weight=weight), dense(normed, k, v))
    sums = q.flatten(2).flatten(0, 1).square().view(140, 4, 32).sum(2).t().contiguous()  # four partial sums
    torch.testing.assert_close(cross_attention(q, k, v, sums, weight), dense(normed, k, v))


@pytest.mark.parametrize("d", [64, 128])
def test_int8_output_is_the_block_format(d):
    q, k, v, weight = draw(d=d, dtype=torch.bfloat16)
    out = cross_attention(q, k, v, norm_weight=weight)
    expected = quantize_block(out.view(140, 2 * d))
    assert all(map(torch.equal, cross_attention(q, k, v, norm_weight=weight, quantize=True), expected))


@pytest.mark.parametrize("quantize", [False, True])
def test_compiled_it_is_one_node(quantize):
    q, k, v, weight = draw()
    graphs = []

    def attend(q, k, v):
        return cross_attention(q, k, v, norm_weight=weight, quantize=quantize)

    compiled = torch.compile(attend, fullgraph=True, backend=lambda g, _: graphs.append(g.graph) or g)
    ours, theirs = compiled(q, k, v), attend(q, k, v)
    assert all(map(torch.equal, ours, theirs))
    op = torch.ops.turbowan.cross_attention_quantized if quantize else torch.ops.turbowan.cross_attention
    assert [node.target for node in graphs[0].nodes].count(op) == 1
    for weights in (weight, None):
        torch.library.opcheck(op.default, (q, k, v, None, weights, 1e-6))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": torch.zeros(2, 20, 2, 32)}, r"\[2, 20, 2, 32\]"),
        ({"v": torch.zeros(2, 21, 2, 64)}, r"\[2, 21, 2, 64\]"),
        ({"k": torch.zeros(2, 0, 2, 64), "v": torch.zeros(2, 0, 2, 64)}, "must be queries and keys"),
        ({"k": torch.zeros(2, 20, 2, 64, dtype=torch.float16)}, "float16"),
        ({"norm_weight": torch.zeros(64)}, r"norm_weight must be \[128\].*\[64\]"),
        ({"sums": torch.zeros(1, 70), "norm_weight": torch.zeros(128)}, r"sums must be .*140.*\[1, 70\]"),
        ({"sums": torch.zeros(1, 140)}, "needs norm_weight"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    q, k, v, _ = draw()
    with pytest.raises(TurboError, match=message):
        cross_attention(q, **{"k": k, "v": v, **change})
