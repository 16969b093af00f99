import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from turbo_core import int8, wan
from turbo_core.errors import TurboError
from turbo_core.wan import QUANTIZED_LINEARS, WanModel, apply_rope, rope_angles, timestep_embedding

DIM, FFN, HEADS, TEXT = 256, 384, 2, 24
PROJ_L = "self_attn.attn_op.local_attn.proj_l"

ATTENTION = [f"{x}.{p}" for x in "qkvo" for p in ("weight", "bias")] + ["norm_q.weight", "norm_k.weight"]
BLOCK_NAMES = [f"{a}.{name}" for a in ("self_attn", "cross_attn") for name in ATTENTION] + [
    *("ffn.0.weight", "ffn.0.bias", "ffn.2.weight", "ffn.2.bias"),
    *("norm3.weight", "norm3.bias", "modulation"),
]
GLOBAL_LINEARS = ["patch_embedding", "head.head", "time_projection.1"] + [
    f"{kind}_embedding.{n}" for kind in ("text", "time") for n in (0, 2)
]
GLOBAL_NAMES = ["head.modulation"] + [f"{name}.{p}" for name in GLOBAL_LINEARS for p in ("weight", "bias")]


def weights(sla=False, in_dim=16, layers=2, seed=0):
    """A state dict with every tensor random, scaled so that activations stay of order one and every part matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = WanModel(DIM, FFN, HEADS, layers, in_dim, text_dim=TEXT, sla=sla)
    sd = {}
    for name, p in model.state_dict().items():
        x = torch.randn(p.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            sd[name] = 1 + 0.2 * x
        elif name.endswith("bias") or "modulation" in name:
            sd[name] = 0.2 * x
        else:
            sd[name] = x / p[0].numel() ** 0.5
    return sd


def quantized(sd, quantize, dtype=torch.float32):
    out = {k: v.to(dtype) if v.ndim > 1 else v for k, v in sd.items()}
    for name in sd:
        if name.startswith("blocks.") and name.removesuffix(".weight").split(".", 2)[2] in QUANTIZED_LINEARS:
            out[name], out[name + "_scale"] = quantize(sd[name])
    return out


def inputs(batch=1, channels=16, grid=(3, 6, 10), seed=1):
    """Latent, timestep and context; 3 x 3 x 5 = 45 tokens, all axes different."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, *grid, generator=generator)
    context = torch.randn(batch, 7, TEXT, generator=generator)
    return x, torch.tensor([932.0, 608.0, 988.0][:batch]), context


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# ---- an independent model: float64, complex RoPE, einsum heads


def complex_rope(grid, d):
    """e^(i angle) [T, H, W, d / 2]: time's pairs first, then height's, then width's."""
    spatial = d // 6
    axes = []
    for axis, pairs in enumerate((d // 2 - 2 * spatial, spatial, spatial)):
        frequency = 10000.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
        position = torch.arange(grid[axis], dtype=torch.float64)
        turn = torch.polar(torch.ones(()).double(), position[:, None] * frequency)
        axes.append(turn.view([-1 if i == axis else 1 for i in range(3)] + [pairs]).expand(*grid, -1))
    return torch.cat(axes, -1)


def rotate(x, turn):
    """x [B, L, H, D] float64 by turn [T, H, W, D / 2]."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn.flatten(0, 2)[:, None]).flatten(-2)


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


# ---- parts


def test_parameter_names_are_the_official_ones():
    model = WanModel(DIM, FFN, HEADS, 2, text_dim=TEXT, sla=True)
    block = [*BLOCK_NAMES, f"{PROJ_L}.weight", f"{PROJ_L}.bias"]
    assert sorted(model.state_dict()) == sorted(GLOBAL_NAMES + [f"blocks.{n}.{name}" for n in (0, 1) for name in block])
    assert model.has_sla
    plain = WanModel(DIM, FFN, HEADS, 1, text_dim=TEXT)
    assert sorted(plain.state_dict()) == sorted(GLOBAL_NAMES + [f"blocks.0.{name}" for name in BLOCK_NAMES])
    assert not plain.has_sla


def test_parameter_shapes_are_the_official_ones():
    with torch.device("meta"):
        model = WanModel(1536, 8960, 12, 1, in_dim=36, sla=True)
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    assert shapes["patch_embedding.weight"] == (1536, 36, 1, 2, 2) and shapes["text_embedding.0.weight"] == (1536, 4096)
    assert shapes["time_embedding.0.weight"] == (1536, 256) and shapes["time_projection.1.weight"] == (9216, 1536)
    assert shapes["head.head.weight"] == (64, 1536) and shapes["head.modulation"] == (1, 2, 1536)
    assert shapes["blocks.0.modulation"] == (1, 6, 1536) and shapes["blocks.0.ffn.0.weight"] == (8960, 1536)
    assert shapes["blocks.0.self_attn.norm_q.weight"] == (1536,)  # over the full width, not a head
    assert shapes[f"blocks.0.{PROJ_L}.weight"] == (128, 128)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 5, 7), (2, 1, 11), (21, 3, 2)])
def test_rope_is_a_complex_rotation(grid, d):
    x = torch.randn(2, math.prod(grid), 3, d, generator=torch.Generator().manual_seed(0))
    angles = rope_angles(grid, d)
    assert angles.shape == (math.prod(grid), d // 2) and angles.dtype == torch.float32
    out = apply_rope(x, angles)
    torch.testing.assert_close(out.double(), rotate(x.double(), complex_rope(grid, d)), rtol=1e-5, atol=1e-5)
    half = apply_rope(x.bfloat16(), angles)
    assert half.dtype == torch.bfloat16 and relative(half, out) < 0.005


def test_rope_pairs_of_a_128_channel_head():
    angles = rope_angles((2, 2, 2), 128)
    time, height, width = angles[4], angles[2], angles[1]
    assert time.nonzero().flatten().tolist() == list(range(22))
    assert height.nonzero().flatten().tolist() == list(range(22, 43))
    assert width.nonzero().flatten().tolist() == list(range(43, 64))
    assert (time[0], height[22], width[43]) == (1, 1, 1)
    assert time[1].item() == pytest.approx(10000 ** (-2 / 44)) and width[44].item() == pytest.approx(10000 ** (-2 / 42))


def test_timestep_embedding_is_cosines_then_sines():
    out = timestep_embedding(torch.tensor([0.0, 1.0, 932.0]), 256)
    assert out.shape == (3, 256) and out.dtype == torch.float32
    assert out[0].tolist() == [1.0] * 128 + [0.0] * 128
    for t, row in zip((1.0, 932.0), out[1:]):
        for i in (0, 1, 64, 127):
            angle = t * 10000 ** (-i / 128)
            assert row[i].item() == pytest.approx(math.cos(angle), abs=1e-7)
            assert row[128 + i].item() == pytest.approx(math.sin(angle), abs=1e-7)


# ---- attention and precision


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
    monkeypatch.setattr(wan, "SLICE", 1)
    model.blocks[0].ffn[1].register_forward_hook(lambda layer, x, y: seen.append(y.shape[1]))
    torch.testing.assert_close(model(*args, topk=0.3), whole, rtol=1e-5, atol=1e-6)
    assert seen == [128, 128, 32]


def test_rope_in_slices_is_the_same(monkeypatch):
    x, angles = torch.randn(2, 300, 3, 128).bfloat16(), rope_angles((3, 10, 10), 128)
    whole = apply_rope(x, angles)
    monkeypatch.setattr(wan, "SLICE", 2 * 128 * 3 * 128)
    assert torch.equal(apply_rope(x, angles), whole)


class NoFloat64(TorchDispatchMode):
    """A device without float64, as Apple GPUs are: the meta device, on which nothing else is computed here."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        assert not (isinstance(out, torch.Tensor) and out.is_meta and out.dtype == torch.float64), function
        return out


def test_devices_without_float64(monkeypatch):
    monkeypatch.setattr(wan, "widest_float", lambda device: torch.float32)
    timestep = torch.tensor([996.0, 608.0])
    exact = timestep_embedding(timestep, 256)
    with NoFloat64():
        assert rope_angles((3, 4, 5), 128, "meta").shape == (60, 64)
        timestep_embedding(timestep.to("meta"), 256)
    monkeypatch.undo()
    torch.testing.assert_close(timestep_embedding(timestep, 256), exact, rtol=0, atol=2e-4)


# ---- state dicts


@pytest.mark.parametrize("sla", [False, True])
@pytest.mark.parametrize("in_dim", [16, 36])
def test_state_dict_round_trip(in_dim, sla):
    sd = weights(sla=sla, in_dim=in_dim)
    model = WanModel.from_state_dict(sd)
    assert (model.in_dim, model.num_heads, len(model.blocks), model.has_sla) == (in_dim, HEADS, 2, sla)
    saved = model.state_dict()
    assert saved.keys() == sd.keys() and all(torch.equal(saved[k], sd[k]) for k in sd)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("quantize", [int8.quantize_block, int8.quantize_rows])
def test_quantized_state_dict_round_trip(quantize):
    sd = quantized(weights(sla=True), quantize)
    saved = WanModel.from_state_dict(sd).state_dict()
    assert saved.keys() == sd.keys()
    assert all(torch.equal(saved[k], sd[k]) and saved[k].dtype == sd[k].dtype for k in sd)


def test_a_dtype_is_for_the_matrices_only():
    sd = quantized(weights(sla=True), int8.quantize_block)
    stored = {k: v.half() if v.is_floating_point() else v for k, v in sd.items()}
    model = WanModel.from_state_dict(stored, dtype=torch.bfloat16)
    for name, t in model.state_dict().items():
        if t.dtype == torch.int8:
            continue
        small = ("norm_q.weight", "norm_k.weight", "modulation", "weight_scale")
        keeps = name.endswith(small) or "norm3" in name or "proj_l" in name
        assert t.dtype == (torch.float32 if keeps else torch.bfloat16), name


def test_heads_of_64_come_from_proj_l():
    sd = weights(sla=True)
    for n in (0, 1):
        sd[f"blocks.{n}.{PROJ_L}.weight"], sd[f"blocks.{n}.{PROJ_L}.bias"] = torch.eye(64), torch.zeros(64)
    model = WanModel.from_state_dict(sd)
    assert model.num_heads == 4 and model(*inputs(), topk=0.5).isfinite().all()
    assert WanModel.from_state_dict(weights(), num_heads=4).num_heads == 4


SD = weights(sla=True)
SCALE = "blocks.1.ffn.0.weight_scale"


@pytest.mark.parametrize("name", [*GLOBAL_NAMES, "blocks.0.ffn.0.weight", *(k for k in SD if k[:8] == "blocks.1")])
def test_a_missing_key_is_named(name):
    with pytest.raises(TurboError, match=name):
        WanModel.from_state_dict({k: v for k, v in SD.items() if k != name})


def test_a_quantized_layer_without_its_bias_is_named():
    sd = quantized(SD, int8.quantize_rows)
    del sd["blocks.1.ffn.0.bias"]
    with pytest.raises(TurboError, match=r"blocks\.1\.ffn\.0\.bias"):
        WanModel.from_state_dict(sd)


@pytest.mark.parametrize(
    "extra",
    [
        {"blocks.0.cross_attn.k_img.weight": torch.zeros(1)},
        {"vace_blocks.0.x": torch.zeros(1)},
        {"blocks.0.nonsense.weight_scale": torch.zeros(1)},
        {"blocks.0.norm3.weight_scale": torch.zeros(1)},
        {"blocks.x.y": torch.zeros(1)},
    ],
)
def test_an_unknown_key_is_named(extra):
    with pytest.raises(TurboError, match=next(iter(extra))):
        WanModel.from_state_dict(SD | extra)


@pytest.mark.parametrize(
    "change",
    [
        {"blocks.1.ffn.2.weight": torch.zeros(DIM, FFN + 1)},
        {"blocks.0.self_attn.norm_q.weight": torch.zeros(128)},
        {"patch_embedding.weight": torch.zeros(DIM, 64)},
        {"blocks.1.ffn.0.weight": torch.zeros(FFN, DIM, dtype=torch.int8)},  # int8 without a scale
        {"blocks.1.ffn.0.weight": torch.zeros(FFN, DIM, dtype=torch.int8), SCALE: torch.ones(2, 3)},
        {"blocks.1.ffn.0.weight": torch.zeros(DIM, DIM, dtype=torch.int8), SCALE: torch.ones(2, 2)},
        {"blocks.1.ffn.0.weight": torch.zeros(FFN, DIM), SCALE: torch.ones(3, 2)},  # a scale without int8
    ],
)
def test_a_tensor_that_does_not_fit_is_named(change):
    with pytest.raises(TurboError, match=next(iter(change)).removesuffix(".weight")):
        WanModel.from_state_dict(SD | change)


@pytest.mark.parametrize("sd", [{}, {"img_in.weight": torch.zeros(4, 4)}, {k: v for k, v in SD.items() if k[0] != "b"}])
def test_no_wan_model_at_all(sd):
    with pytest.raises(TurboError, match="Wan"):
        WanModel.from_state_dict(sd)


def test_heads_that_do_not_divide():
    for heads in (3, 0, -1):
        with pytest.raises(TurboError, match=str(heads)):
            WanModel(DIM, FFN, heads, 1)
    with pytest.raises(TurboError, match="heads"):
        WanModel.from_state_dict(WanModel(64, 64, 1, 1, text_dim=TEXT).state_dict())  # heads of 128 are the default


@pytest.mark.parametrize("grid", [(3, 5, 10), (3, 6, 9)])
def test_odd_latents_are_refused(grid):
    with pytest.raises(TurboError, match=rf"even.*{grid[1]}, {grid[2]}"):
        WanModel.from_state_dict(SD)(*inputs(grid=grid))


def test_channels_that_do_not_fit_are_refused():
    x, t, context = inputs()
    with pytest.raises(TurboError, match=r"takes 36 latent channels, got 16.*image"):
        WanModel.from_state_dict(weights(in_dim=36, layers=1))(x, t, context)
    with pytest.raises(TurboError, match="takes 16 latent channels, got 36"):
        WanModel.from_state_dict(SD)(x, t, context, y=inputs(channels=20)[0])
