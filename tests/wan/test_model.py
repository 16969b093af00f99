"""The network against the equations in float64, and what must not change what it computes."""

import pytest
import torch

from tests.helpers.tensors import relative
from tests.helpers.wan import DIM, HEADS, PROJ_L, complex_rope, inputs, quantized, rotate, weights
from turbo_core import int8
from turbo_core.errors import TurboError
from turbo_core.wan import WanModel, layers


def slow_wan(sd, x, timestep, context):
    """The network once more in float64, from the state dict and the equations alone."""
    p = {k: v.double() for k, v in sd.items()}
    x, timestep, context = x.double(), timestep.double(), context.double()

    def linear(name, x):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def normal(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    def rms(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}.weight"]

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))

    def silu(x):
        return x / (1 + torch.exp(-x))

    def attention(name, x, source, turn=None):
        q, k = rms(linear(f"{name}.q", x), f"{name}.norm_q"), rms(linear(f"{name}.k", source), f"{name}.norm_k")
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in (q, k, linear(f"{name}.v", source)))
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        p_attn = (torch.einsum("blhd,bkhd->bhlk", q, k) / (DIM // HEADS) ** 0.5).softmax(-1)
        return linear(f"{name}.o", torch.einsum("bhlk,bkhd->blhd", p_attn, v).flatten(2))

    b, _, t, h, w = x.shape
    grid = (t, h // 2, w // 2)
    patches = x.reshape(b, -1, t, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
    tokens = patches @ p["patch_embedding.weight"].flatten(1).T + p["patch_embedding.bias"]
    angle = timestep[:, None] * 10000.0 ** -(torch.arange(128).double() / 128)
    time = linear("time_embedding.2", silu(linear("time_embedding.0", torch.cat([angle.cos(), angle.sin()], 1))))
    e = linear("time_projection.1", silu(time)).unflatten(1, (6, DIM))
    context = linear("text_embedding.2", gelu(linear("text_embedding.0", context)))
    turn = complex_rope(grid, DIM // HEADS)
    for n in range(1 + max(int(k.split(".")[1]) for k in p if k.startswith("blocks."))):
        name = f"blocks.{n}"
        m = (p[f"{name}.modulation"] + e).unsqueeze(2).unbind(1)  # shift, scale, gate; twice
        y = normal(tokens) * (1 + m[1]) + m[0]
        tokens = tokens + m[2] * attention(f"{name}.self_attn", y, y, turn)
        y = normal(tokens) * p[f"{name}.norm3.weight"] + p[f"{name}.norm3.bias"]
        tokens = tokens + attention(f"{name}.cross_attn", y, context)
        y = normal(tokens) * (1 + m[4]) + m[3]
        tokens = tokens + m[5] * linear(f"{name}.ffn.2", gelu(linear(f"{name}.ffn.0", y)))
    shift, scale = (p["head.modulation"] + time[:, None]).unsqueeze(2).unbind(1)
    out = linear("head.head", normal(tokens) * (1 + scale) + shift)
    out = out.view(b, *grid, 2, 2, 16)  # a patch's rows, its columns, then channels
    return torch.einsum("bthwrsc->bcthrws", out).reshape(b, 16, t, h, w)


@pytest.mark.parametrize("grid", [(3, 6, 10), (1, 2, 2), (2, 10, 6)])
def test_float32_model_is_the_equations(grid):
    sd = weights()
    x, t, context = inputs(2, grid=grid)
    out = WanModel.from_state_dict(sd)(x, t, context)
    assert out.shape == x.shape and out.dtype == x.dtype
    torch.testing.assert_close(out.double(), slow_wan(sd, x, t, context), rtol=1e-4, atol=2e-5)


def test_image_to_video_takes_mask_and_clip_behind_the_noise():
    sd = weights(in_dim=36)
    x, t, context = inputs(2)
    y = inputs(2, channels=20, seed=5)[0]
    out = WanModel.from_state_dict(sd)(x, t, context, y=y)
    assert out.shape == x.shape
    torch.testing.assert_close(out.double(), slow_wan(sd, torch.cat([x, y], 1), t, context), rtol=1e-4, atol=2e-5)


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
    monkeypatch.setattr(layers, "SLICE", 1)
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
