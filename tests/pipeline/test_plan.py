"""The memory planner against what torch allocates: small and middling models for real, the published ones by shape."""

import math

import pytest
import torch

from tests.helpers import allocating
from tests.helpers.live_bytes import LiveBytes
from tests.helpers.tiny_dits import tiny_state_dict
from turbo_core import channels, checkpoint
from turbo_core.checkpoint.shapes import Sizes
from turbo_core.errors import TurboError
from turbo_core.int8 import block_scale_shape, products, reference
from turbo_core.pipeline import plan, sizes
from turbo_core.sla import reference as attention
from turbo_core.vae import TinyDecoder, WanVAE, ops
from turbo_core.vae.memory import piece_bytes
from turbo_core.vae.past import Past
from turbo_core.wan import QUANTIZED_LINEARS, Int8Linear, Text, WanModel, block, fused, layers

TOLERANCE = 0.1
SMALL = plan.Model(Sizes(256, 16, 16, 640, 64, 256, 128), 2, True)
MIDDLING = plan.Model(Sizes(512, 36, 16, 2816, 64, 256, 64), 1, True)  # heads of 64, image-to-video
GRIDS = {SMALL: (5, 16, 18), MIDDLING: (3, 20, 16)}  # latent; 360 tokens are ragged blocks, 240 too
CASES = [
    pytest.param(linears, topk, precision, id=f"{linears}-{precision if topk else 'dense'}")
    for linears, topk, precision in [
        ("float", None, "bf16"),
        ("float", 0.1, "bf16"),
        ("float", 0.1, "int8"),
        ("int8_block", 0.1, "bf16"),
        ("int8_row", 0.1, "bf16"),
    ]
]


@pytest.fixture(autouse=True)
def card(monkeypatch):
    """The plan is for cards, which multiply int8 and compute whole slices: a CPU's tiles are smaller."""
    monkeypatch.setattr(products, "int_mm_pays", lambda device: True)
    for module in (products, reference, layers):
        monkeypatch.setattr(module, "has_cache", lambda device: False)
    monkeypatch.setattr(attention, "_has_cache", lambda device: False)


def network(model, linears):
    """One block is enough: all are alike, and the peak lies in one."""
    s = model.sizes
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # made so: tensors with shapes only cannot be cast in place
    net = WanModel(s.dim, s.ffn_dim, s.dim // s.head_dim, 1, s.in_dim, s.out_dim, s.text_dim, sla=model.has_sla)
    torch.set_default_dtype(before)
    net.requires_grad_(False)
    if linears != "float":
        for name in QUANTIZED_LINEARS:
            old = net.get_submodule(f"blocks.0.{name}")
            rows, cols = old.weight.shape
            scale = torch.ones(block_scale_shape(rows, cols) if linears == "int8_block" else (rows, 1))
            layer = Int8Linear(torch.zeros(rows, cols, dtype=torch.int8), scale, old.bias)
            net.set_submodule(f"blocks.0.{name}", layer)
    return net


def counted(model, grid, linears, topk, precision, text=40):
    """Bytes at the peak of one evaluation, inputs included, weights not."""
    net = network(model, linears)
    with torch.no_grad(), LiveBytes() as count:
        x = torch.randn(1, 16, *grid)
        y = torch.randn(1, model.sizes.in_dim - 16, *grid) if model.sizes.in_dim > 16 else None
        context = torch.randn(1, text, model.sizes.text_dim)
        net(x, torch.tensor([900.0]), context, y, topk, precision)
    return count.peak


def compare(model, grid, linears, topk, precision, text=40):
    tokens = grid[0] * grid[1] * grid[2] // 4
    forecast, moment, living = plan.step_peak(model, tokens, linears, topk, precision, text)
    assert forecast == sum(living.values())
    found = counted(model, grid, linears, topk, precision, text)
    print(f"{linears} {topk} {precision}: {tokens} tokens, {found / 1e6:.1f} MB, {forecast / found - 1:+.1%}, {moment}")
    assert abs(forecast / found - 1) < TOLERANCE


def test_counter_counts_what_lives_and_forgets_what_died():
    with LiveBytes() as count:
        a = torch.zeros(1000, dtype=torch.float32)
        view = a[:10].view(2, 5)
        assert count.live == 4000
        b = a + 1
        b.mul_(2)
        del a
        assert count.live == 8000  # the view keeps its storage
        del view, b
        assert (count.live, count.peak) == (0, 8000)


@pytest.mark.parametrize(("linears", "topk", "precision"), CASES)
@pytest.mark.parametrize("model", [SMALL, MIDDLING], ids=["small", "middling"])
def test_peak_of_a_step_is_what_torch_allocates(model, linears, topk, precision):
    # five frames of 512 x 576 pixels and three of 320 x 256: thousands of tokens, so that no constant hides an error
    frames, height, width = GRIDS[model]
    compare(model, (frames, 2 * height, 2 * width), linears, topk, precision)


def by_shape():
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    return fake.FakeTensorMode()


# rows or floats, topk 1.0 or dense, or fewer frames where the many slices would take a minute even without data
@pytest.mark.parametrize(
    ("name", "size", "linears", "topk", "precision"),
    [
        ("t2v-1.3b", (832, 480, 81), "float", None, "bf16"),
        ("t2v-1.3b", (832, 480, 49), "int8_block", 0.1, "bf16"),
        ("t2v-1.3b", (832, 480, 81), "float", 0.1, "int8"),
        ("t2v-14b", (1280, 720, 81), "int8_row", None, "bf16"),
        ("i2v-a14b", (1280, 720, 81), "float", 1.0, "bf16"),
    ],
)
def test_peak_of_a_step_at_the_published_sizes(name, size, linears, topk, precision):
    with by_shape():
        compare(plan.PUBLISHED[name], sizes.latent_shape(*size), linears, topk, precision, plan.TEXT_TOKENS)


@pytest.mark.parametrize("linears", ["float", "int8_block", "int8_row"])
def test_the_comparison_can_fail(linears):
    """A feed-forward part that is a third wider than told is noticed."""
    frames, height, width = GRIDS[MIDDLING]
    wider = MIDDLING._replace(sizes=MIDDLING.sizes._replace(ffn_dim=3712))
    found = counted(wider, (frames, 2 * height, 2 * width), linears, None, "bf16")
    assert plan.step_peak(MIDDLING, frames * height * width, linears, None)[0] < (1 - TOLERANCE) * found


@pytest.fixture
def kernels(monkeypatch):
    """The fused block with operations that allocate what kernels allocate."""
    for module in (fused, layers):
        monkeypatch.setattr(module, "operations", lambda device, *_: allocating.OPERATIONS)
    monkeypatch.setattr(fused, "pays", lambda device: True)
    monkeypatch.setattr(layers, "use_triton", lambda device, family: True)
    monkeypatch.setattr(block, "sla_from_qkv", allocating.attention)


def test_keys_and_values_of_the_text_stay():
    """As many as the plan adds, of a text without padding."""
    net, text = network(SMALL, "float"), Text(torch.randn(1, 40, SMALL.sizes.text_dim))
    with torch.no_grad():
        net(torch.randn(1, 16, 1, 4, 4), torch.tensor([900.0]), text)
    [kept] = text.of(net, torch.bfloat16)[2]
    assert sum(t.nbytes for t in kept[0]) == plan.kept_text_bytes(SMALL._replace(blocks=1), 40)


@pytest.mark.parametrize("linears", ["int8_block", "int8_row"])
@pytest.mark.parametrize(("topk", "precision"), [(None, "bf16"), (0.1, "bf16"), (0.1, "int8")])
def test_kernels_need_no_more_than_the_plan(kernels, linears, topk, precision):
    """At 14B and 720p; the plan is that of the layers, which compute in torch."""
    model, size = plan.PUBLISHED["t2v-14b"], (1280, 720, 81)
    planned, moment, _ = plan.step_peak(model, 75600, linears, topk, precision)
    with by_shape():
        found = counted(model, sizes.latent_shape(*size), linears, topk, precision, plan.TEXT_TOKENS)
    print(f"{linears} {topk} {precision}: {found / 1e9:.2f} GB, planned {planned / 1e9:.2f} GB for {moment}")
    assert found <= planned


@pytest.mark.parametrize("frames", [1, 2, 4])
@pytest.mark.parametrize("work", ["decode", "encode", "tiny decode"])
def test_vae_s_bytes_per_pixel(work, frames, monkeypatch):
    """Of the second and third piece, at the published width: the first is one frame and smaller."""
    width, height, past = 832, 480, Past()
    monkeypatch.setattr(ops, "_has_onednn", lambda *_: False)  # as on a card
    monkeypatch.setattr(channels.reference, "_SLICE", {})
    with by_shape(), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        model = TinyDecoder(False) if "tiny" in work else WanVAE(96)
        pieces = [(1, 1), (frames, 4 * frames), (frames, 4 * frames)]
        latents = [torch.randn(1, 16, n, height // 8, width // 8) for n, _ in pieces]
        videos = [torch.randn(1, 3, n, height, width) for _, n in pieces]
        torch.set_default_dtype(torch.float32)
        with LiveBytes() as count:
            for latent, video in zip(latents, videos):
                piece, run = (video, model.encode_piece) if work == "encode" else (latent, model.decode_piece)
                run(piece.contiguous(memory_format=torch.channels_last_3d), past)
    forecast = piece_bytes(work, width * height, frames, model.dim, torch.bfloat16)
    print(f"{work} {frames}: {count.peak / 1e9:.2f} GB, {forecast / count.peak - 1:+.1%}")
    assert abs(forecast / count.peak - 1) < TOLERANCE
    if frames == 1 and "tiny" not in work:
        assert plan.vae_peak(width, height, work) == forecast > 5 * plan.vae_peak(width, height, work, tiled=True)


def test_weights_are_those_of_the_files(tmp_path):
    source = tmp_path / "source.pth"
    torch.save(tiny_state_dict(0), source)
    model = plan.model_of(checkpoint.inspect(source))
    for format in ("int8_block", "int8_row", "fp8", "bf16", "fp32"):
        done = checkpoint.convert(source, tmp_path / "x.safetensors", format)
        assert abs(plan.weight_bytes(model, format)[0] / done.bytes - 1) < 0.02, format


def test_weights_of_the_published_models():
    """Parameters as published: 1.42 and 14.29 billion; the text encoder 5.68 billion."""
    for name, gigabytes in [("t2v-1.3b", (2.84, 1.45)), ("t2v-14b", (28.6, 14.5))]:
        model = plan.PUBLISHED[name]
        for format, expected in zip(("bf16", "int8_block"), gigabytes):
            assert math.isclose(plan.weight_bytes(model, format)[0] / 1e9, expected, rel_tol=0.01)
    total, block = plan.weight_bytes(plan.PUBLISHED["t2v-14b"], "int8_block")
    assert 0.9 < 40 * block / total < 1
    assert math.isclose(plan.text_encoder_bytes() / 1e9, 11.36, rel_tol=0.01)


def stages(memory, name="t2v-14b", size=(832, 480, 81), **more):
    return {stage.name: stage for stage in plan.stages(plan.PUBLISHED[name], *size, memory, **more)}


def test_verdicts_follow_the_room():
    small = stages(8, "t2v-1.3b")
    assert {name: stage.fits for name, stage in small.items()} == {
        "text encoder": "offload",
        "sampling": "resident",
        "VAE decode": "resident",
    }
    assert stages(8, size=(1280, 720, 81))["VAE decode"].fits == "resident"
    tiled = stages(6, size=(1280, 720, 81))["VAE decode"]
    assert tiled.fits == "tiled" and "in one piece it is 6." in tiled.verdict
    assert stages(8, size=(1280, 720, 81))["sampling"].fits == "offload"
    assert stages(5, size=(1280, 720, 81))["sampling"].fits == "no"
    assert stages(32)["sampling"].fits == "resident"
    two = stages(24, "i2v-a14b")
    assert "one expert on the card" in two["sampling"].verdict and "VAE encode" in two
    assert "both experts" in stages(80, "i2v-a14b")["sampling"].verdict
    offload = stages(16)["sampling"]
    assert offload.fits == "offload" and "GiB of weights stay on the card" in offload.verdict


def test_fp8_counts_as_what_it_becomes():
    model = plan.PUBLISHED["t2v-14b"]
    weights = {
        (has_sla, format): plan.stages(model._replace(has_sla=has_sla), 832, 480, 81, 24, format)[1].weights
        for has_sla in (True, False)
        for format in ("fp8", "bf16")
    }
    assert weights[True, "fp8"] == weights[True, "bf16"] > 1.9 * weights[False, "fp8"]


@pytest.mark.parametrize("name", list(plan.PUBLISHED))
def test_more_memory_never_makes_it_worse_and_more_frames_never_better(name):
    order = ["no", "tiled", "offload", "resident"]
    for stage in ("text encoder", "sampling", "VAE decode"):
        ranks = [order.index(stages(memory, name)[stage].fits) for memory in (4, *plan.CARDS, 80)]
        assert ranks == sorted(ranks)
    longer = [stages(16, name, (832, 480, frames))["sampling"].activations for frames in (1, 5, 81, 161)]
    assert longer == sorted(longer)


def test_what_cannot_be_planned_is_refused():
    model = plan.PUBLISHED["t2v-1.3b"]
    for arguments, words in [
        ((model, 830, 480, 81, 16), "multiples of 16"),
        ((model, 832, 480, 80, 16), "4n . 1"),
        ((model, 832, 480, 81, 0.5), "less than what is set aside"),
        ((model, 832, 480, 81, math.nan), "less than"),
        ((model, 832, 480, 81, 16, "int4"), "Unknown format"),
        ((model, 832, 480, 81, 16, "bf16", 2.0), "fraction"),
        ((model, 832, 480, 81, 16, "bf16", 0.1, "fp4"), "precision"),
    ]:
        with pytest.raises(TurboError, match=words):
            plan.stages(*arguments)
