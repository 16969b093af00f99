"""Prepared keys and values, and the sums of the linear branch, against float64 and the torch reference."""

import pytest
import torch
from turbo_core.kernels.sla_pool import pool_means
from turbo_core.kernels.sla_prepare import prepare

from tests.helpers.attention_inputs import EPS, SHAPES, draw, raw_form
from tests.helpers.oracles import assert_near
from turbo_core.kernels import sla_prepare
from turbo_core.sla import reference
from turbo_core.sla.blocks import in_blocks


def prepared_k(k_out, k_scale):
    return k_out.double() * k_scale.double().repeat_interleave(64, 2)[:, :, : k_out.shape[2], None]


@pytest.mark.parametrize("length, b, h, d, layout", SHAPES)
def test_low_bit_keys_and_values(length, b, h, d, layout):
    q, k, v = draw(length, b=b, h=h, d=d, layout=layout)
    k_mean, v_amax = pool_means(q, k, v)[2:]
    k_out, k_scale, v_out, v_scale, kv, k_sum = prepare(k, v, k_mean, v_amax, linear=False)
    assert kv is None and k_sum is None
    by_torch = reference._fake_int8(in_blocks(k - k_mean[:, None], 64)).view(b, h, -1, d)[:, :, :length]
    wrong = (prepared_k(k_out, k_scale) - by_torch).abs() > 1e-4 * k_scale.amax()
    assert wrong.double().mean() < 1e-3  # k - mean is rounded once in both; the quotient may land beside a tie
    centred = (k.double() - k_mean[:, None]).transpose(1, 2)
    step = k_scale.repeat_interleave(64, 2)[:, :, :length, None]
    assert ((prepared_k(k_out, k_scale) - centred).abs() <= 0.501 * step).all()

    assert v_out.dtype == torch.float8_e4m3fn and v_out.shape == (b, h, d, -(-length // 64) * 64)
    assert (v_out[..., length:].float() == 0).all()
    exact = v.transpose(1, 2)
    values = (v_out[..., :length].float() * v_scale[..., None]).transpose(-1, -2)
    assert ((values - exact).abs() <= 2**-4 * exact.abs() + 2**-10 * v_scale[:, :, None]).all()
    torch.testing.assert_close(v_scale, exact.abs().amax(2).clamp_min(1e-8) / 448)
    by_torch = reference._fake_fp8(v, v_amax[:, None] / 448).transpose(1, 2)
    assert ((values - by_torch).abs() > 1e-6 * exact.abs()).double().mean() < 1e-3


def test_values_as_fp16():
    q, k, v = draw(130, b=2, layout="interleaved")
    k_mean, v_amax = pool_means(q, k, v)[2:]
    v_out, v_scale = prepare(k, v, k_mean, v_amax, fp8=False)[2:4]
    assert v_out.dtype == torch.float16
    exact = v.transpose(1, 2)
    assert ((v_out * v_scale[:, :, None] - exact).abs() <= 2**-11 * exact.abs() + 1e-6 * v_scale[:, :, None]).all()


def test_channels_and_heads_of_nothing():
    k, v = torch.zeros(2, 1, 70, 2, 64)
    zero = torch.zeros(1, 2, 64)
    k_out, k_scale, v_out, v_scale, _, _ = prepare(k, v, zero, zero)
    assert (k_out == 0).all() and (v_out.float() == 0).all() and (k_scale > 0).all() and (v_scale > 0).all()


def test_a_card_of_any_number_of_multiprocessors_gives_the_same(monkeypatch):
    """What a block of keys becomes is its own affair, and the sums over them differ in their last bits alone."""
    q, k, v = draw(450)  # eight blocks, the last one ragged
    k_mean, v_amax = pool_means(q, k, v)[2:]
    results = []
    for count in (1, 3, 400):
        monkeypatch.setattr(sla_prepare, "processors", lambda device, count=count: count)
        results.append(prepare(k, v, k_mean, v_amax))
    for other in results[1:]:
        for name, ours, theirs in zip(("k", "k_scale", "v", "v_scale"), results[0], other):
            assert torch.equal(ours.float(), theirs.float()), name
        for ours, theirs in zip(results[0][4:], other[4:]):
            assert_near(theirs, ours, 1e-5)


def test_the_common_offset_of_the_keys_costs_no_digits():
    q, k, v = draw(200)
    results = []
    for offset in (0, 500):
        k_mean, v_amax = pool_means(q, k + offset, v)[2:]
        k_out, k_scale = prepare(k + offset, v, k_mean, v_amax, linear=False)[:2]
        results.append(prepared_k(k_out, k_scale))
    assert (results[0] - results[1]).abs().max() < 1.1 * k_scale.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length, b, h, d, partials", [(65, 2, 3, 64, 3), (130, 1, 1, 128, 1)])
def test_the_raw_form_of_the_keys(length, b, h, d, partials, dtype):
    q, k, v = draw(length, b=b, h=h, d=d, dtype=dtype)
    raw, (_, exact) = raw_form(q, k, partials)
    sums, _, weight, *rest = raw
    k_mean, v_amax = pool_means(q, k, v, *raw)[2:]
    k_out, k_scale, _, _, kv, k_sum = prepare(k, v, k_mean, v_amax, True, True, True, sums, weight, *rest)
    centred = (exact - k_mean[:, None]).transpose(1, 2)
    step = k_scale.repeat_interleave(64, 2)[:, :, :length, None]
    assert ((prepared_k(k_out, k_scale) - centred).abs() <= 0.51 * step).all()
    ck = exact.transpose(1, 2).softmax(-1)
    assert_near(kv, ck.transpose(-1, -2) @ v.double().transpose(1, 2), 0.003)
    assert_near(k_sum, ck.sum(2), 1e-5)
    # the norm alone and the rotation alone are forms of their own
    normed = prepare(k, v, low_bit=False, linear=False, sums=sums, k_weight=weight, eps=EPS)[0].transpose(1, 2)
    again = prepare(normed, v, low_bit=False, linear=False, cos=rest[1], sin=rest[2])[0]
    assert again.dtype == dtype
    assert_near(again, exact.transpose(1, 2), 0.01)


def test_without_low_bits_nothing_is_copied():
    _, k, v = draw(65, dtype=torch.bfloat16)
    k_out, k_scale, v_out, v_scale, kv, _ = prepare(k, v, low_bit=False)
    assert (k_out.data_ptr(), v_out.data_ptr()) == (k.data_ptr(), v.data_ptr())
    assert k_out.shape == v_out.shape == (1, 2, 65, 64) and k_scale is None and v_scale is None
    assert kv.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_key_or_value_spoils_its_own_block_alone(bad):
    q, k, v = draw(200)
    good = prepare(k, v, *pool_means(q, k, v)[2:], linear=False)
    k[0, 70, 1, 5] = v[0, 70, 1, 6] = bad
    out = prepare(k, v, *pool_means(q, k, v)[2:], linear=False)
    assert out[1].isnan().nonzero().tolist() == [[0, 1, 1]] == (~out[1].isfinite()).nonzero().tolist()
    assert torch.equal(out[0][0, 0], good[0][0, 0])
    assert ((out[0][0, 1, 128:].int() - good[0][0, 1, 128:].int()).abs() <= 60).all()  # another mean of channel 5
    assert out[2].float().isnan().nonzero().tolist() == [[0, 1, 6, 70]]
    assert out[3].isfinite().all()


# ---- the linear branch's sums


@pytest.mark.parametrize("length, b, h, d, layout", SHAPES)
def test_sums_of_the_linear_branch_against_float64(length, b, h, d, layout):
    _, k, v = draw(length, b=b, h=h, d=d, layout=layout)
    kv, k_sum = prepare(k, v, low_bit=False)[4:]
    ck = k.double().transpose(1, 2).softmax(-1)
    assert_near(kv, ck.transpose(-1, -2) @ v.double().transpose(1, 2), 1e-6)
    assert_near(k_sum, ck.sum(2), 1e-6)


def test_sums_in_half_precision_do_not_overflow():
    _, k, v = draw(720, h=1, dtype=torch.float16)
    v = v + 5000  # 720 / 64 of these per channel, and more in channels that dominate: above 65504
    k[..., 0] += 20
    kv, k_sum = prepare(k, v, low_bit=False)[4:]
    ck = k.double().transpose(1, 2).softmax(-1)
    assert kv.max() > 65504
    assert_near(kv, ck.transpose(-1, -2) @ v.double().transpose(1, 2), 0.001)
    assert_near(k_sum, ck.sum(2), 1e-5)


@pytest.mark.parametrize("programs", [1, 5, 1000])  # one part; ragged parts of three blocks; a part for each block
def test_parts_add_up_to_the_same(programs, monkeypatch):
    q, k, v = draw(720, h=1)
    k_mean, v_amax = pool_means(q, k, v)[2:]
    whole = prepare(k, v, k_mean, v_amax)
    monkeypatch.setattr(sla_prepare, "PROGRAMS", programs)
    parts = prepare(k, v, k_mean, v_amax)
    for one, other in zip(whole[:4], parts[:4]):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    for one, other in zip(whole[4:], parts[4:]):
        assert_near(one, other.double(), 1e-6)


def test_two_runs_give_the_same_bits():
    q, k, v = draw(150, dtype=torch.bfloat16)
    raw, _ = raw_form(q, k)
    sums, _, weight, *rest = raw

    def everything():
        found = pool_means(q, k, v, *raw)
        return [*found, *prepare(k, v, found[2], found[3], True, True, True, sums, weight, *rest)]

    for one, other in zip(everything(), everything()):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_impossible_input_is_refused():
    q, k, v = draw(70)
    mean = torch.zeros(1, 2, 64)
    (sums, _, weight, *_), _ = raw_form(q, k)
    for expected, call in [
        ("k_mean", lambda: prepare(k, v, None, mean)),
        ("v_amax", lambda: prepare(k, v, mean, mean.half())),
        ("same shape", lambda: prepare(k, v[:, 1:], mean, mean)),
        ("eps", lambda: prepare(k, v, mean, mean, sums=sums, k_weight=weight, eps=float("nan"))),
    ]:
        with pytest.raises(ValueError, match=expected):
            call()
