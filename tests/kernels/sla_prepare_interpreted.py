"""Preparation kernels of sparse attention against float64 and the torch twins; runs under TRITON_INTERPRET=1."""

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.poison import poisoned
from tests.triton_cpu.interpreter import repair

repair()

from turbo_core.kernels.sla_pool import pool_means  # noqa: E402
from turbo_core.kernels.sla_prepare import prepare  # noqa: E402

from kernels import sla_pool, sla_prepare  # noqa: E402
from turbo_core.sla import reference  # noqa: E402
from turbo_core.sla.blocks import in_blocks, pool  # noqa: E402

EPS = 1e-6
# (L, B, H, D, layout): one token; around one key block; one query block less some; a ragged fourth key block; more
SHAPES = [(1, 1, 1, 64, "planes"), (63, 2, 3, 64, "interleaved"), (64, 1, 2, 128, "planes"), (65, 1, 1, 128, "planes")]
SHAPES += [(120, 2, 1, 64, "planes"), (200, 1, 2, 128, "interleaved"), (720, 1, 1, 64, "interleaved")]


@pytest.fixture(autouse=True)
def poison():
    with poisoned():
        yield


def draw(length, b=1, h=1, d=64, dtype=torch.float32, layout="planes", seed=0):
    """q, k, v as models have them: outlier channels, a large common key offset, heads and blocks of different size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, b, length, h, d, generator=generator) * torch.linspace(0.5, 2, h)[:, None]
    x[:, :, 64:128] *= 3
    x[0, ..., 3] *= 20
    x[1] += 10 * torch.randn(h, d, generator=generator)
    x[2, ..., ::5] *= 30
    x = x.to(dtype)
    if layout == "interleaved":  # [B, L, 3, H, D], as one projection to q, k and v leaves it
        x = x.permute(1, 2, 0, 3, 4).contiguous().permute(2, 0, 1, 3, 4)
    return x.unbind(0)


def raw_form(q, k, partials=2, seed=1):
    """What norms and rotates q and k on load, and the float64 q and k that come of it."""
    b, length, h, d = q.shape
    generator = torch.Generator().manual_seed(seed)
    weights = [1 + 0.2 * torch.randn(h * d, generator=generator) for _ in range(2)]
    angles = 6 * torch.rand(length, d // 2, generator=generator)
    squares = torch.stack([x.double().flatten(2).square() for x in (q, k)]).view(2, b * length, partials, -1)
    sums = squares.sum(-1).transpose(1, 2).float().contiguous()
    exact = []
    for x, weight in zip((q, k), weights):
        x = F.rms_norm(x.double().flatten(2), (h * d,), weight.double(), EPS).unflatten(-1, (h, d))
        turn = torch.polar(torch.ones(length, 1, d // 2).double(), angles[:, None].double())
        exact.append(torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2))
    return (sums, *weights, EPS, angles.cos(), angles.sin()), exact


def means(x, block):
    """Block means of x [B, L, H, D] in float64."""
    return torch.stack([part.double().mean(1) for part in x.split(block, 1)], 2)


def close(out, exact, tolerance):
    assert out.shape == exact.shape
    assert ((out.double() - exact).abs().max() <= tolerance * exact.abs().max()).item()


def prepared_k(k_out, k_scale):
    return k_out.double() * k_scale.double().repeat_interleave(64, 2)[:, :, : k_out.shape[2], None]


# ---- over all tokens


@pytest.mark.parametrize("length, b, h, d, layout", SHAPES)
def test_means_and_ranges_against_float64(length, b, h, d, layout):
    q, k, v = draw(length, b, h, d, layout=layout)
    pooled_q, pooled_k, k_mean, v_amax = pool_means(q, k, v)
    close(pooled_q, means(q, 128), 1e-6)
    close(pooled_k, means(k, 64), 1e-6)
    close(k_mean, k.double().mean(1), 1e-6)
    assert torch.equal(v_amax, v.abs().amax(1))
    torch.testing.assert_close(pooled_k, pool(k, 64))
    assert pool_means(q, k)[3] is None


@pytest.mark.parametrize("h, dtype", [(1, torch.bfloat16), (5, torch.float16)], ids=str)
def test_means_of_half_precision(h, dtype):
    # below and above the group of heads that one program owns
    q, k, v = draw(130, 2, h, dtype=dtype, layout="interleaved")
    pooled_q, pooled_k, k_mean, v_amax = pool_means(q, k, v)
    close(pooled_q, means(q, 128), 1e-6)
    close(pooled_k, means(k, 64), 1e-6)
    close(k_mean, k.double().mean(1), 1e-6)
    assert torch.equal(v_amax, v.abs().amax(1).float())


@pytest.mark.parametrize("length, keys", [(300, 77), (1, 129)])
def test_means_of_other_keys_than_queries(length, keys):
    q, (_, k, v) = draw(length, 2, 1)[0], draw(keys, 2, 1, seed=1)
    pooled_q, pooled_k, k_mean, v_amax = pool_means(q, k, v)
    close(pooled_q, means(q, 128), 1e-6)
    close(pooled_k, means(k, 64), 1e-6)
    close(k_mean, k.double().mean(1), 1e-6)
    assert torch.equal(v_amax, v.abs().amax(1))


@pytest.mark.parametrize("length, b, h, d", [(65, 2, 3, 64), (130, 1, 1, 128)])
def test_means_of_the_raw_form(length, b, h, d):
    q, k, _ = draw(length, b, h, d, torch.bfloat16)
    raw, exact = raw_form(q, k)
    pooled_q, pooled_k, k_mean, _ = pool_means(q, k, None, *raw)
    close(pooled_q, means(exact[0], 128), 1e-5)
    close(pooled_k, means(exact[1], 64), 1e-5)
    close(k_mean, exact[1].mean(1), 1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_number_stays_in_its_block(bad):
    q, k, v = draw(200, h=2)
    for x in (q, k, v):
        x[0, 70, 1, 5] = bad
    pooled_q, pooled_k, k_mean, v_amax = pool_means(q, k, v)
    assert (~pooled_q.isfinite()).nonzero().tolist() == [[0, 1, 0, 5]]
    assert (~pooled_k.isfinite()).nonzero().tolist() == [[0, 1, 1, 5]]
    others = torch.cat([k[:, :64], k[:, 128:]], 1)
    close(k_mean[0, 1, 5], others[0, :, 1, 5].double().mean(), 1e-6)
    v[0, 70, 1, 5] = 0
    assert torch.equal(v_amax, v.abs().amax(1))


# ---- keys and values


@pytest.mark.parametrize("length, b, h, d, layout", SHAPES)
def test_low_bit_keys_and_values(length, b, h, d, layout):
    q, k, v = draw(length, b, h, d, layout=layout)
    k_mean, v_amax = pool_means(q, k, v)[2:]
    k_out, k_scale, v_out, v_scale, kv, k_sum = prepare(k, v, k_mean, v_amax, linear=False)
    assert kv is None and k_sum is None
    twin = reference._fake_int8(in_blocks(k - k_mean[:, None], 64)).view(b, h, -1, d)[:, :, :length]
    wrong = (prepared_k(k_out, k_scale) - twin).abs() > 1e-4 * k_scale.amax()
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
    twin = reference._fake_fp8(v, v_amax[:, None] / 448).transpose(1, 2)
    assert ((values - twin).abs() > 1e-6 * exact.abs()).double().mean() < 1e-3


def test_values_as_fp16():
    q, k, v = draw(130, 2, 2, layout="interleaved")
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


def test_the_common_offset_of_the_keys_costs_no_digits():
    q, k, v = draw(200, h=2)
    results = []
    for offset in (0, 500):
        k_mean, v_amax = pool_means(q, k + offset, v)[2:]
        k_out, k_scale = prepare(k + offset, v, k_mean, v_amax, linear=False)[:2]
        results.append(prepared_k(k_out, k_scale))
    assert (results[0] - results[1]).abs().max() < 1.1 * k_scale.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length, b, h, d, partials", [(65, 2, 3, 64, 3), (130, 1, 1, 128, 1)])
def test_the_raw_form_of_the_keys(length, b, h, d, partials, dtype):
    q, k, v = draw(length, b, h, d, dtype)
    raw, (_, exact) = raw_form(q, k, partials)
    sums, _, weight, *rest = raw
    k_mean, v_amax = pool_means(q, k, v, *raw)[2:]
    k_out, k_scale, _, _, kv, k_sum = prepare(k, v, k_mean, v_amax, True, True, True, sums, weight, *rest)
    centred = (exact - k_mean[:, None]).transpose(1, 2)
    step = k_scale.repeat_interleave(64, 2)[:, :, :length, None]
    assert ((prepared_k(k_out, k_scale) - centred).abs() <= 0.51 * step).all()
    ck = exact.transpose(1, 2).softmax(-1)
    close(kv, ck.transpose(-1, -2) @ v.double().transpose(1, 2), 0.003)
    close(k_sum, ck.sum(2), 1e-5)
    # the norm alone and the rotation alone are forms of their own
    normed = prepare(k, v, low_bit=False, linear=False, sums=sums, k_weight=weight, eps=EPS)[0].transpose(1, 2)
    again = prepare(normed, v, low_bit=False, linear=False, cos=rest[1], sin=rest[2])[0]
    assert again.dtype == dtype
    close(again, exact.transpose(1, 2), 0.01)


def test_without_low_bits_nothing_is_copied():
    _, k, v = draw(65, h=2, dtype=torch.bfloat16)
    k_out, k_scale, v_out, v_scale, kv, _ = prepare(k, v, low_bit=False)
    assert (k_out.data_ptr(), v_out.data_ptr()) == (k.data_ptr(), v.data_ptr())
    assert k_out.shape == v_out.shape == (1, 2, 65, 64) and k_scale is None and v_scale is None
    assert kv.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_key_or_value_spoils_its_own_block_alone(bad):
    q, k, v = draw(200, h=2)
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
    _, k, v = draw(length, b, h, d, layout=layout)
    kv, k_sum = prepare(k, v, low_bit=False)[4:]
    ck = k.double().transpose(1, 2).softmax(-1)
    close(kv, ck.transpose(-1, -2) @ v.double().transpose(1, 2), 1e-6)
    close(k_sum, ck.sum(2), 1e-6)


def test_sums_in_half_precision_do_not_overflow():
    _, k, v = draw(720, dtype=torch.float16)
    v = v + 5000  # 720 / 64 of these per channel, and more in channels that dominate: above 65504
    k[..., 0] += 20
    kv, k_sum = prepare(k, v, low_bit=False)[4:]
    ck = k.double().transpose(1, 2).softmax(-1)
    assert kv.max() > 65504
    close(kv, ck.transpose(-1, -2) @ v.double().transpose(1, 2), 0.001)
    close(k_sum, ck.sum(2), 1e-5)


@pytest.mark.parametrize("programs", [1, 5, 1000])  # one part; ragged parts of three blocks; a part for each block
def test_parts_add_up_to_the_same(programs, monkeypatch):
    q, k, v = draw(720, 1, 1)
    k_mean, v_amax = pool_means(q, k, v)[2:]
    whole = prepare(k, v, k_mean, v_amax)
    monkeypatch.setattr(sla_prepare, "PROGRAMS", programs)
    parts = prepare(k, v, k_mean, v_amax)
    for one, other in zip(whole[:4], parts[:4]):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    for one, other in zip(whole[4:], parts[4:]):
        close(one, other.double(), 1e-6)


def test_two_runs_give_the_same_bits():
    q, k, v = draw(150, 1, 2, dtype=torch.bfloat16)
    raw, _ = raw_form(q, k)
    sums, _, weight, *rest = raw

    def everything():
        found = pool_means(q, k, v, *raw)
        return [*found, *prepare(k, v, found[2], found[3], True, True, True, sums, weight, *rest)]

    for one, other in zip(everything(), everything()):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


# ---- impossible input


def test_impossible_input_is_refused():
    q, k, v = draw(70, h=2)
    mean = torch.zeros(1, 2, 64)
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
        ("k_mean", lambda: prepare(k, v, None, mean)),
        ("v_amax", lambda: prepare(k, v, mean, mean.half())),
        ("same shape", lambda: prepare(k, v[:, 1:], mean, mean)),
        ("eps", lambda: pool_means(q, k, None, sums, weight, weight, 0.0)),
        ("eps", lambda: prepare(k, v, mean, mean, sums=sums, k_weight=weight, eps=float("nan"))),
    ]:
        with pytest.raises(ValueError, match=expected):
            call()


def test_the_kernels_are_launched_with_room_for_every_head():
    assert sla_pool.GROUP & (sla_pool.GROUP - 1) == 0  # a power of two: it is the width of a tile
