"""Block means, the mean key and the ranges of values against float64."""

import pytest
import torch
from turbo_core.kernels.sla_pool import GROUP, pool_means

from tests.helpers.attention_inputs import SHAPES, draw, raw_form
from tests.helpers.oracles import assert_near
from turbo_core.sla.blocks import pool


def means(x, block):
    """Block means of x [B, L, H, D] in float64."""
    return torch.stack([part.double().mean(1) for part in x.split(block, 1)], 2)


@pytest.mark.parametrize("length, b, h, d, layout", SHAPES)
def test_means_and_ranges_against_float64(length, b, h, d, layout):
    q, k, v = draw(length, b=b, h=h, d=d, layout=layout)
    pooled_q, pooled_k, k_mean, v_amax = pool_means(q, k, v)
    assert_near(pooled_q, means(q, 128), 1e-6)
    assert_near(pooled_k, means(k, 64), 1e-6)
    assert_near(k_mean, k.double().mean(1), 1e-6)
    assert torch.equal(v_amax, v.abs().amax(1))
    torch.testing.assert_close(pooled_k, pool(k, 64))
    assert pool_means(q, k)[3] is None


@pytest.mark.parametrize("h, dtype", [(1, torch.bfloat16), (5, torch.float16)], ids=str)
def test_means_of_half_precision(h, dtype):
    # below and above the group of heads that one program owns
    q, k, v = draw(130, b=2, h=h, dtype=dtype, layout="interleaved")
    pooled_q, pooled_k, k_mean, v_amax = pool_means(q, k, v)
    assert_near(pooled_q, means(q, 128), 1e-6)
    assert_near(pooled_k, means(k, 64), 1e-6)
    assert_near(k_mean, k.double().mean(1), 1e-6)
    assert torch.equal(v_amax, v.abs().amax(1).float())


@pytest.mark.parametrize("length, keys", [(300, 77), (1, 129)])
def test_means_of_other_keys_than_queries(length, keys):
    q, k, v = draw(length, keys, b=2, h=1)
    pooled_q, pooled_k, k_mean, v_amax = pool_means(q, k, v)
    assert_near(pooled_q, means(q, 128), 1e-6)
    assert_near(pooled_k, means(k, 64), 1e-6)
    assert_near(k_mean, k.double().mean(1), 1e-6)
    assert torch.equal(v_amax, v.abs().amax(1))


@pytest.mark.parametrize("length, b, h, d", [(65, 2, 3, 64), (130, 1, 1, 128)])
def test_means_of_the_raw_form(length, b, h, d):
    q, k, _ = draw(length, b=b, h=h, d=d, dtype=torch.bfloat16)
    raw, exact = raw_form(q, k)
    pooled_q, pooled_k, k_mean, _ = pool_means(q, k, None, *raw)
    assert_near(pooled_q, means(exact[0], 128), 1e-5)
    assert_near(pooled_k, means(exact[1], 64), 1e-5)
    assert_near(k_mean, exact[1].mean(1), 1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_number_stays_in_its_block(bad):
    q, k, v = draw(200, h=2)
    for x in (q, k, v):
        x[0, 70, 1, 5] = bad
    pooled_q, pooled_k, k_mean, v_amax = pool_means(q, k, v)
    assert (~pooled_q.isfinite()).nonzero().tolist() == [[0, 1, 0, 5]]
    assert (~pooled_k.isfinite()).nonzero().tolist() == [[0, 1, 1, 5]]
    others = torch.cat([k[:, :64], k[:, 128:]], 1)
    assert_near(k_mean[0, 1, 5], others[0, :, 1, 5].double().mean(), 1e-6)
    v[0, 70, 1, 5] = 0
    assert torch.equal(v_amax, v.abs().amax(1))


def test_impossible_input_is_refused():
    q, k, _ = draw(70)
    (sums, weight, _, _, cos, sin), _ = raw_form(q, k)
    for expected, call in [
        ("last stride", lambda: pool_means(q, k.transpose(2, 3).contiguous().transpose(2, 3))),
        ("64 or 128", lambda: pool_means(*(x[..., :32] for x in (q, k)))),
        ("bfloat16", lambda: pool_means(q.double(), k.double())),
        ("one dtype", lambda: pool_means(q, k.half())),
        ("same B, H and D", lambda: pool_means(q, k[:, :, :1])),
        ("same length", lambda: pool_means(q[:, :60], k, cos=cos, sin=sin)),
        ("sums", lambda: pool_means(q, k, None, sums[..., 1:], weight, weight)),
        ("weight", lambda: pool_means(q, k, None, sums, weight, None)),
        ("together", lambda: pool_means(q, k, cos=cos)),
        ("cos", lambda: pool_means(q, k, cos=cos[:, 1:], sin=sin)),
        ("eps", lambda: pool_means(q, k, None, sums, weight, weight, 0.0)),
    ]:
        with pytest.raises(ValueError, match=expected):
            call()


def test_the_kernels_are_launched_with_room_for_every_head():
    assert GROUP & (GROUP - 1) == 0  # a power of two: it is the width of a tile
