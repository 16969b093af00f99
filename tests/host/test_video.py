"""Kinds of video in the real ComfyUI: first and last frame, context windows, parts in a chain, batches, tiles."""

import importlib

import pytest
import torch

WIDTH, HEIGHT, FRAMES = 64, 48, 13
LATENT = (1, 16, 4, 6, 8)


@pytest.fixture(scope="module")
def vae(comfy, tiny):
    state, metadata = comfy.utils.load_torch_file(str(tiny / "tiny_wan_vae.safetensors"), return_metadata=True)
    with torch.inference_mode():
        return comfy.sd.VAE(sd=state, metadata=metadata)


@pytest.fixture(scope="module")
def experts(lab):
    with torch.inference_mode():
        return [lab.load(f"TinyWan2.2-I2V-{noise}-quant.pth") for noise in ("high", "low")]


def _picture(seed):
    return torch.rand(1, HEIGHT, WIDTH, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def between(lab, vae):
    """Conditioning and latent of the host's node for a first and a last picture, each by its seed or None."""
    from comfy_extras.nodes_wan import WanFirstLastFrameToVideo

    def condition(first, last, batch=1):
        positive = lab.positive()
        pictures = [None if seed is None else _picture(seed) for seed in (first, last)]
        size = (WIDTH, HEIGHT, FRAMES, batch)
        node = WanFirstLastFrameToVideo.execute(positive, positive, vae, *size, *pictures)
        return {"positive": node[0], "latent": node[2]}

    return condition


def _watched(model, seen):
    """A clone of the MODEL that notes what each evaluation gets."""

    def note(apply_model, args):
        seen.append({**args["c"], "x": args["input"]})
        return apply_model(args["input"], args["timestep"], **args["c"])

    model = model.clone()
    model.set_model_unet_function_wrapper(note)
    return model


def _windowed(model, length, overlap, schedule="standard_static", freenoise=False):
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode

    return WanContextWindowsManualNode.execute(model, length, overlap, schedule, 1, False, "pyramid", freenoise)[0]


def test_both_frames_reach_both_experts_as_mask_and_latents(lab, vae, experts, between):
    seen = []
    high, low = (_watched(expert, seen) for expert in experts)
    lab.turbo(high, model_low=low, **between(1, 2))
    assert len(seen) == 4
    # what Wan's first/last-frame models take: per latent frame the four video frames in it, ones where they are given;
    # the first latent frame holds one video frame, which counts four times
    given = torch.zeros(FRAMES)
    given[[0, -1]] = 1
    mask = torch.cat([given[:1].repeat(3), given]).view(-1, 4).T[None, :, :, None, None].expand(1, 4, *LATENT[2:])
    video = torch.full((FRAMES, HEIGHT, WIDTH, 3), 0.5)  # grey where nothing is given
    video[0], video[-1] = _picture(1)[0], _picture(2)[0]
    latents = experts[0].model.process_latent_in(vae.encode(video))
    for evaluation in seen:
        concat = evaluation["c_concat"].float()
        assert concat.shape == (1, 20, *LATENT[2:])
        assert torch.equal(concat[:, :4], mask)
        assert torch.allclose(concat[:, 4:], latents, atol=1e-2)
        assert "clip_fea" not in evaluation


@pytest.mark.parametrize("other", [(3, 2), (1, 3), (1, None), (None, 2)])
def test_another_first_or_last_frame_is_another_video(lab, experts, between, other):
    high, low = experts
    video = lab.turbo(high, model_low=low, **between(1, 2))
    assert torch.isfinite(video).all()
    assert lab.difference(lab.turbo(high, model_low=low, **between(*other)), video) > 0.01


def test_first_frame_alone_is_what_turbo_core_feeds_the_model(lab, vae, experts, between, monkeypatch):
    from turbo_core import pipeline

    def encode(_, video):  # by the host's VAE, whose numbers are the ones to meet
        pixels = (video.movedim(1, -1)[0] + 1) / 2
        return experts[0].model.process_latent_in(vae.encode(pixels))

    monkeypatch.setattr(importlib.import_module("turbo_core.pipeline.sampling"), "encode_video", encode)
    seen = []
    lab.turbo(_watched(experts[0], seen), steps=1, **between(1, None))
    ours = pipeline.encode_image(None, _picture(1)[0].movedim(-1, 0) * 2 - 1, FRAMES)
    assert torch.allclose(seen[0]["c_concat"].float(), ours, atol=1e-2)


# 11 latent frames in windows of 5 with 1 in common: 0-4, 4-8, and 6-10, which ends with the video
def test_context_windows_are_evaluated_one_by_one_and_joined(lab):
    seen, latent = [], lab.latent((1, 16, 11, 6, 8))
    model = _windowed(_watched(lab.load(), seen), 17, 4)
    out = lab.turbo(model, latent)
    assert len(seen) == 3 * 4
    # the host puts one frame before each window but the first, and drops it again
    assert [evaluation["x"].shape[2] for evaluation in seen[:3]] == [5, 6, 6]
    assert out.shape == latent["samples"].shape and torch.isfinite(out).all()
    assert lab.difference(out, lab.turbo(lab.load(), latent)) > 0.01


def test_a_video_of_one_window_is_what_it_is_without_the_node(lab):
    model, latent = lab.load(), lab.latent((1, 16, 5, 6, 8))
    assert torch.equal(lab.turbo(_windowed(model, 17, 4, freenoise=True), latent), lab.turbo(model, latent))


# the noise of the first step is shuffled among windows; windows that move from step to step
@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform"])
def test_windows_reproduce_and_work_with_settings_and_plain_samplers(lab, schedule):
    model = _windowed(lab.attention(lab.load(), 0.5, "int8"), 17, 8, schedule, freenoise=True)
    latent = lab.latent((1, 16, 11, 6, 8))
    out = lab.turbo(model, latent)
    assert torch.equal(lab.turbo(model, latent), out)
    # the host's lcm at the same sigmas is the same rule; top-k and int8 turn its last bits into a little more
    assert lab.difference(lab.custom(model, "lcm", lab.sigmas(model=model), latent), out) < 0.02


def test_windows_over_two_experts_keep_the_first_frame(lab, experts, between):
    seen = []
    high, low = (_windowed(_watched(expert, seen), 5, 0) for expert in experts)
    out = lab.turbo(high, model_low=low, **between(1, None))
    assert out.shape == LATENT and len(seen) == 2 * 4
    first, second = seen[0]["c_concat"], seen[1]["c_concat"]
    assert first[:, :4, 0].all() and not second[:, :4].any()  # only the first window holds the given frame


def test_a_batch_with_first_and_last_frame(lab, experts, between):
    high, low = experts
    out = lab.turbo(high, model_low=low, **between(1, 2, batch=2))
    assert out.shape == (2, *LATENT[1:])
    assert lab.difference(out[:1], out[1:]) > 0.01


def test_a_chain_has_each_frame_once(lab, vae):
    """The nodes of turbowan_long_chained: last frame, the rest of the next part, and both in one batch."""
    from comfy_extras.nodes_images import ImageFromBatch
    from comfy_extras.nodes_post_processing import BatchImagesNode

    parts = [vae.decode(lab.latent(LATENT, seed=seed)["samples"])[0] for seed in (1, 2)]
    last = ImageFromBatch.execute(parts[0], -1, 1)[0]
    assert torch.equal(last, parts[0][-1:])
    rest = ImageFromBatch.execute(parts[1], 1, 4096)[0]
    whole = BatchImagesNode.execute({"image0": parts[0], "image1": rest})[0]
    assert torch.equal(whole, torch.cat([parts[0], parts[1][1:]]))


def test_tiles_that_do_not_cut_time_keep_every_frame(lab, vae):
    """temporal_size 4096 of the workflows: a tile that holds the picture gives the untiled result, a cut does not."""
    import nodes

    latent = lab.latent((1, 16, 7, 6, 8), seed=1)
    whole = vae.decode(latent["samples"])[0]
    decode = nodes.VAEDecodeTiled().decode
    assert torch.allclose(decode(vae, latent, 512, 64, 4096, 8)[0], whole, atol=1e-5)
    cut = decode(vae, latent, 512, 64, 8, 4)[0]
    assert cut.shape == whole.shape and (cut - whole).abs().max() > 0.01
