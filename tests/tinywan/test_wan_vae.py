"""The VAE for training computes what the published one computes, from the same state dict."""

import pytest
import torch
from safetensors.torch import save_file

from turbo_core.pipeline.vae import LATENT_MEAN, LATENT_STD
from turbo_core.tinywan import vae, world
from turbo_core.tinywan.data import images_of
from turbo_core.tinywan.vae import match_statistics
from turbo_core.tinywan.vae import train as train_vae
from turbo_core.tinywan.wan_vae import WanVAE


@pytest.mark.parametrize("frames", [1, 9])  # a picture has no time; 9 frames are 3 latent ones
def test_the_vae_of_whole_clips_is_the_published_one(frames, tmp_path):
    pytest.importorskip("diffusers")
    from turbo_core.pipeline.vae import load_vae

    torch.manual_seed(0)
    ours = WanVAE(8)
    torch.nn.init.normal_(ours.encoder.middle[1].proj.weight, std=0.3)  # it starts as zero
    save_file(ours.state_dict(), tmp_path / "vae.safetensors")
    theirs = load_vae(tmp_path / "vae.safetensors")
    video = torch.randn(1, 3, frames, 32, 16)
    with torch.no_grad():
        latent = ours.encode(video)[0]
        torch.testing.assert_close(latent, theirs.encode(video).latent_dist.mode(), atol=1e-4, rtol=1e-4)
        shown = ours.decode(latent).clamp(-1, 1)  # as the published one does
        assert (shown.abs() < 1).float().mean() > 0.5
        torch.testing.assert_close(shown, theirs.decode(latent).sample, atol=1e-4, rtol=1e-4)


def test_latents_get_the_statistics_of_wan_and_clips_stay():
    torch.manual_seed(0)
    vae, video = WanVAE(8), torch.randn(2, 3, 9, 32, 32)
    with torch.no_grad():
        mean, log_variance = vae.encode(video)
        before, noise = vae.decode(mean), (log_variance / 2).exp() / mean.std((0, 2, 3, 4), keepdim=True)
        match_statistics(vae, video)
        mean, log_variance = vae.encode(video)
        torch.testing.assert_close(vae.decode(mean), before, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(mean.mean((0, 2, 3, 4)), torch.tensor(LATENT_MEAN), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(mean.std((0, 2, 3, 4)), torch.tensor(LATENT_STD), atol=1e-3, rtol=1e-3)
    after = (log_variance / 2).exp() / mean.std((0, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(after, noise, atol=1e-3, rtol=1e-2)


def test_training_the_decoder_alone_leaves_the_latents(tmp_path):
    torch.manual_seed(0)
    vae = WanVAE(8)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    train_vae(tmp_path, model=vae, fixed_latents=True, steps=1, image_steps=1, batch=1, pool=1, log=lambda line: None)
    moved = {name.split(".")[0] for name, tensor in vae.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"decoder", "conv2"}


def test_what_an_image_to_video_model_is_given_is_the_pipelines(tmp_path):
    pytest.importorskip("diffusers")
    from turbo_core.pipeline import encode_image
    from turbo_core.pipeline.vae import load_vae

    video = world.render(world.random_scenes(2, torch.Generator().manual_seed(0)), 9, 64, 64, torch.Generator())
    torch.manual_seed(0)
    path = vae.save(WanVAE(8), tmp_path / "vae.safetensors")
    ours, codec = images_of(vae.load(path), video), load_vae(path)
    for row, clip in zip(ours, video):
        theirs = encode_image(codec, clip[:, 0], 9)[0]
        assert torch.equal(row[:4], theirs[:4])
        assert (row[4:] - theirs[4:]).norm() < 0.02 * theirs[4:].norm()  # ours may be in bfloat16
