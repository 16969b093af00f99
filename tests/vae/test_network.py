"""The Wan VAE against diffusers' AutoencoderKLWan: any width, any size, one frame and many, every cut of a video."""

import pytest
import torch

from turbo_core.errors import TurboError
from turbo_core.vae import LATENT_MEAN, LATENT_STD, WanVAE, coding, decode_each, decode_video, encode_video
from turbo_core.vae.files import diffusers_name

oracle = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan").AutoencoderKLWan
MEAN, STD = (torch.tensor(row).view(1, -1, 1, 1, 1) for row in (LATENT_MEAN, LATENT_STD))


def pair(dim, dtype=torch.float32):
    """Ours and theirs with the same random weights, of activations near one."""
    torch.manual_seed(dim)
    ours = WanVAE(dim)
    for name, tensor in ours.named_parameters():
        if tensor.ndim > 1 and not name.endswith("gamma"):
            last = name.endswith(("residual.6.weight", "proj.weight"))  # as trained ones, each layer adds a little
            torch.nn.init.normal_(tensor, std=(0.3 if last else 1.0) * tensor[0].numel() ** -0.5)
        elif name.endswith("gamma"):
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
    ours.conv1.weight.data *= 0.3
    theirs = oracle(base_dim=dim, z_dim=16)
    theirs.load_state_dict({diffusers_name(name): value for name, value in ours.state_dict().items()})
    return ours.to(dtype).eval().requires_grad_(False), theirs.to(dtype).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tiny():
    return pair(8)


def pieces_of(monkeypatch, frames):
    monkeypatch.setattr(coding, "frames_of_a_piece", lambda *_: frames)


# one frame, which has no time; two latent frames; ragged sizes, an odd number of latent pixels; a batch
@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (1, 5, 24, 40), (1, 17, 16, 8), (2, 9, 8, 24)])
def test_it_is_diffusers(tiny, shape):
    ours, theirs = tiny
    batch, frames, height, width = shape
    video = torch.rand(batch, 3, frames, height, width) * 2 - 1
    with torch.no_grad():
        latent = encode_video(ours, video)
        expected = (theirs.encode(video).latent_dist.mode() - MEAN) / STD
        torch.testing.assert_close(latent, expected, atol=1e-5, rtol=1e-5)
        shown, expected = decode_video(ours, latent), theirs.decode(latent * STD + MEAN).sample
    assert shown.shape == video.shape and shown.std() > 0.1 and (shown.abs() < 1).float().mean() > 0.3
    torch.testing.assert_close(shown, expected, atol=1e-5, rtol=0)


def test_the_published_width_is_diffusers():
    ours, theirs = pair(96)
    video = torch.rand(1, 3, 5, 32, 16) * 2 - 1
    with torch.no_grad():
        mean = theirs.encode(video).latent_dist.mode()
        latent = encode_video(ours, video)
        torch.testing.assert_close(latent, (mean - MEAN) / STD, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            decode_video(ours, latent), theirs.decode(latent * STD + MEAN).sample, atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float32_as_diffusers(dtype):
    ours, theirs = pair(8, dtype)
    exact, _ = pair(8)
    latent = torch.randn(1, 16, 3, 4, 4)
    with torch.no_grad():
        expected = decode_video(exact, latent)
        error = (decode_video(ours, latent) - expected).norm()
        other = (theirs.decode((latent * STD + MEAN).to(dtype)).sample.float() - expected).norm()
    assert 0 < error < 1.1 * other


@pytest.mark.parametrize("frames", [1, 2, 3])  # 3 leaves a rest of 1 of the 4 latent frames after the first
def test_any_cut_gives_the_same_numbers(tiny, frames, monkeypatch):
    ours, _ = tiny
    video = torch.rand(1, 3, 17, 16, 24) * 2 - 1
    pieces_of(monkeypatch, 4)
    latent = encode_video(ours, video)
    shown = decode_video(ours, latent)
    pieces_of(monkeypatch, frames)
    torch.testing.assert_close(encode_video(ours, video), latent, atol=1e-6, rtol=1e-6)
    seen = []
    parts = decode_each(ours, latent, lambda piece: piece, progress=lambda *at: seen.append(at))
    torch.testing.assert_close(torch.cat(parts, 2), shown, atol=1e-5, rtol=0)
    assert [part.shape[2] for part in parts][:2] == [1, 4 * frames]
    assert [done for done, _ in seen] == [1, *range(1 + frames, 5, frames), 5] and {total for _, total in seen} == {5}


def test_later_frames_do_not_change_earlier_latents(tiny):
    ours, _ = tiny
    video = torch.rand(1, 3, 9, 16, 16)
    torch.testing.assert_close(encode_video(ours, video)[:, :, :2], encode_video(ours, video[:, :, :5]))


def test_a_pass_with_gradients_gives_the_same_numbers(tiny):
    ours, _ = tiny
    latent = torch.randn(1, 16, 3, 2, 3, requires_grad=True)
    shown = ours.decode(latent)
    torch.testing.assert_close(shown.clamp(-1, 1), decode_video(ours, (latent.detach() - MEAN) / STD))
    shown.sum().backward()
    assert (latent.grad.abs().amax((0, 1, 3, 4)) > 0).all()


def test_tiles_are_the_whole_where_there_is_one_and_near_it_where_there_are_more(tiny):
    ours, theirs = tiny
    small = torch.randn(1, 16, 2, 4, 4)
    assert torch.equal(decode_video(ours, small, tiled=True), decode_video(ours, small))
    video = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 5, 5) * 2 - 1, (5, 272, 328), mode="trilinear")
    latent = encode_video(ours, video)
    tiled_latent = encode_video(ours, video, tiled=True)
    assert tiled_latent.shape == latent.shape and (tiled_latent - latent).norm() < 0.1 * latent.norm()
    whole, tiled = decode_video(ours, latent), decode_video(ours, latent, tiled=True)
    theirs.enable_tiling()
    other = theirs.decode(latent * STD + MEAN).sample
    theirs.disable_tiling()
    error, others = (tiled - whole).norm(), (other - whole).norm()
    assert tiled.shape == whole.shape and 0 < error < 1.1 * others  # diffusers' tiles are of the same size and overlap


@pytest.mark.parametrize("shape", [(1, 3, 4, 16, 16), (1, 3, 2, 16, 16), (1, 3, 5, 20, 16), (1, 4, 5, 16, 16)])
def test_a_video_of_another_shape_is_refused(tiny, shape):
    with pytest.raises(TurboError, match=r"4n \+ 1.*multiples of 8.*Leave frames out"):
        encode_video(tiny[0], torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 48, 2, 4, 4), (16, 2, 4, 4), (1, 16, 0, 4, 4)])
def test_latents_of_another_model_are_refused(tiny, shape):
    with pytest.raises(TurboError, match=r"latents must be .B, 16, T, H, W."):
        decode_video(tiny[0], torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_latents_that_are_no_numbers_are_refused(tiny, value):
    latent = torch.zeros(1, 16, 2, 4, 4)
    latent[0, 3, 1, 2, 2] = value
    with pytest.raises(TurboError, match="NaN or infinity: sampling failed"):
        decode_video(tiny[0], latent)
