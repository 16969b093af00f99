"""The network against the equations in float64, and what must not change what it computes."""

import pytest
import torch

from tests.helpers.tensors import relative
from tests.helpers.wan import PROJ_L, exact_wan, inputs, quantized, weights
from turbo_core import int8
from turbo_core.errors import TurboError
from turbo_core.wan import WanModel, layers


@pytest.mark.parametrize("grid", [(3, 6, 10), (1, 2, 2), (2, 10, 6)])
def test_float32_model_is_the_equations(grid):
    sd = weights()
    x, t, context = inputs(2, grid=grid)
    out = WanModel.from_state_dict(sd)(x, t, context)
    assert out.shape == x.shape and out.dtype == x.dtype
    torch.testing.assert_close(out.double(), exact_wan(sd, x, t, context), rtol=1e-4, atol=2e-5)


def test_image_to_video_takes_mask_and_clip_behind_the_noise():
    sd = weights(in_dim=36)
    x, t, context = inputs(2)
    y = inputs(2, channels=20, seed=5)[0]
    out = WanModel.from_state_dict(sd)(x, t, context, y=y)
    assert out.shape == x.shape
    torch.testing.assert_close(out.double(), exact_wan(sd, torch.cat([x, y], 1), t, context), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("sla", [False, True])
@pytest.mark.parametrize("topk", [None, 0.3])
def test_a_batch_of_two_is_two_runs(topk, sla):
    model = WanModel.from_state_dict(weights(sla=sla))
    x, t, context = inputs(2, grid=(3, 12, 16))
    both = model(x, t, context, topk=topk)
    for i in range(2):
        one = slice(i, i + 1)
        torch.testing.assert_close(model(x[one], t[one], context[one], topk=topk), both[one], rtol=1e-4, atol=1e-5)


def test_dense_is_topk_1_without_the_linear_branch():
    sd = weights(sla=True)
    args = inputs(grid=(3, 12, 16))
    model = WanModel.from_state_dict(sd)
    dense = model(*args)
    plain = WanModel.from_state_dict({k: v for k, v in sd.items() if PROJ_L not in k})
    torch.testing.assert_close(plain(*args), dense, rtol=0, atol=0)
    torch.testing.assert_close(plain(*args, topk=1.0), dense, rtol=1e-4, atol=1e-5)
    assert relative(model(*args, topk=1.0), dense) > 0.01  # the branch is there, and adds
    silent = WanModel.from_state_dict({k: torch.zeros_like(v) if PROJ_L in k else v for k, v in sd.items()})
    torch.testing.assert_close(silent(*args, topk=1.0), dense, rtol=1e-4, atol=1e-5)


def test_topk_and_precision_reach_the_attention():
    model, args = WanModel.from_state_dict(weights(sla=True)), inputs(grid=(3, 12, 16))
    whole, sparse = model(*args, topk=1.0), model(*args, topk=0.3)
    low_bit = model(*args, topk=0.3, precision="int8")
    assert relative(sparse, whole) > 1e-3
    assert 1e-5 < relative(low_bit, sparse) < 0.02
    with pytest.raises(TurboError, match="precision"):
        model(*args, topk=0.3, precision="fp4")


@pytest.mark.parametrize("quantize", [int8.quantize_block, int8.quantize_rows])
def test_int8_model_is_the_float_model_within_2_percent(quantize):
    sd = weights(sla=True)
    args = inputs(2, grid=(3, 12, 16))
    exact = WanModel.from_state_dict(sd)(*args, topk=0.5)
    model = WanModel.from_state_dict(quantized(sd, quantize))
    assert sum(p.dtype == torch.int8 for p in model.state_dict().values()) == 2 * 10
    assert 0.001 < relative(model(*args, topk=0.5), exact) < 0.02


@pytest.mark.parametrize("topk", [None, 0.5])
def test_bf16_model_is_close_to_float32(topk):
    sd, args = weights(sla=True), inputs(2, grid=(3, 12, 16))
    exact = WanModel.from_state_dict(sd)(*args, topk=topk)
    model = WanModel.from_state_dict(sd, dtype=torch.bfloat16)
    out = model(*args, topk=topk)
    assert out.dtype == torch.float32 and model.patch_embedding.weight.dtype == torch.bfloat16
    assert 1e-4 < relative(out, exact) < 0.015
    assert model(args[0].bfloat16(), *args[1:], topk=topk).dtype == torch.bfloat16


@pytest.mark.parametrize("quantize", [None, int8.quantize_block, int8.quantize_rows])
def test_some_tokens_at_a_time_give_the_same(quantize, monkeypatch):
    # 2 x 144 tokens: slices of 128 and 16, in the feed-forward part, where the samples follow each other, 128 and 32
    sd, args = weights(sla=True), inputs(2, grid=(3, 12, 16))
    model = WanModel.from_state_dict(quantized(sd, quantize) if quantize else sd)
    whole, seen = model(*args, topk=0.3), []
    monkeypatch.setattr(layers, "BITE", 1)
    model.blocks[0].ffn[1].register_forward_hook(lambda layer, x, y: seen.append(y.shape[1]))
    torch.testing.assert_close(model(*args, topk=0.3), whole, rtol=1e-5, atol=1e-6)
    assert seen == [128, 128, 32]


@pytest.mark.parametrize("grid", [(3, 5, 10), (3, 6, 9)])
def test_odd_latents_are_refused(grid):
    with pytest.raises(TurboError, match=rf"even.*{grid[1]}, {grid[2]}"):
        WanModel.from_state_dict(weights())(*inputs(grid=grid))


def test_channels_that_do_not_fit_are_refused():
    x, t, context = inputs()
    with pytest.raises(TurboError, match=r"takes 36 latent channels, got 16.*image"):
        WanModel.from_state_dict(weights(in_dim=36, layers=1))(x, t, context)
    with pytest.raises(TurboError, match="takes 16 latent channels, got 36"):
        WanModel.from_state_dict(weights())(x, t, context, y=inputs(channels=20)[0])
