"""TinyWan's VAE while it is trained: statistics of its latents, parts that stay."""

import pytest
import torch

from turbo_core.pipeline import encode_image
from turbo_core.tinywan import vae, world
from turbo_core.tinywan.data import images_of
from turbo_core.tinywan.vae import fresh, make_small, match_statistics
from turbo_core.tinywan.vae import train as train_vae
from turbo_core.vae import LATENT_MEAN, LATENT_STD, load_vae


def test_latents_get_the_statistics_of_wan_and_clips_stay():
    torch.manual_seed(0)
    vae, video = fresh(8), torch.randn(2, 3, 9, 32, 32)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smaller_numbers_in_the_network_are_the_same_numbers_outside(dtype):
    torch.manual_seed(0)
    vae, video = fresh(8), torch.randn(1, 3, 9, 32, 32, dtype=dtype)
    for name, tensor in vae.named_parameters():
        if name.endswith("bias") and name.count(".") > 1:
            torch.nn.init.normal_(tensor)
    vae.to(dtype).requires_grad_(False)
    largest = []
    layer = vae.decoder.middle[0]
    layer.register_forward_hook(lambda _, given, made: largest.append(made.abs().max().item()))
    found = []
    for _ in range(2):
        mean, log_variance = vae.encode(video)
        found.append((mean, log_variance, vae.decode(mean)))
        make_small(vae, 2.0**-6)
    assert all(torch.equal(one, other) for one, other in zip(*found))
    assert largest[0] == 64 * largest[len(largest) // 2]


def test_a_vae_stays_as_it_is_trained_and_its_file_has_smaller_numbers(tmp_path):
    """Rates are for weights of one: a decoder trained after it was made small lost 4.6 dB in 100 steps."""
    torch.manual_seed(0)
    model, video = fresh(8), torch.randn(1, 3, 9, 32, 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    codec = load_vae(vae.save(model, tmp_path / "vae.safetensors"), dtype=torch.float32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    written = codec.state_dict()["decoder.conv1.weight"]
    assert torch.equal(64 * written, before["decoder.conv1.weight"].bfloat16().float())
    model.bfloat16().float()
    with torch.no_grad():
        mean, _ = model.encode(video)
        assert torch.equal(codec.encode(video)[0], mean) and torch.equal(codec.decode(mean), model.decode(mean))
    vae.finish(model)
    assert torch.equal(model.state_dict()["decoder.conv1.weight"], before["decoder.conv1.weight"].bfloat16().float())


def test_training_the_decoder_alone_leaves_the_latents(tmp_path):
    torch.manual_seed(0)
    vae = fresh(8)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    train_vae(tmp_path, model=vae, fixed_latents=True, steps=1, image_steps=1, batch=1, pool=1, log=lambda line: None)
    moved = {name.split(".")[0] for name, tensor in vae.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"decoder", "conv2"}


def test_what_an_image_to_video_model_is_given_is_the_pipelines(tmp_path):
    video = world.render(world.random_scenes(2, torch.Generator().manual_seed(0)), 9, 64, 64, torch.Generator())
    torch.manual_seed(0)
    codec = load_vae(vae.save(fresh(8), tmp_path / "vae.safetensors"))
    for row, clip in zip(images_of(codec, video), video):
        torch.testing.assert_close(row, encode_image(codec, clip[:, 0], 9)[0])


def test_the_whole_network_learns(tmp_path):
    """Gradients reach every weight through the pieces that a clip is cut into, those of time from several frames."""
    torch.manual_seed(0)
    model = fresh(8)
    torch.nn.init.normal_(model.encoder.middle[1].proj.weight, std=0.3)  # it starts as zero
    torch.nn.init.normal_(model.decoder.middle[1].proj.weight, std=0.3)
    shown, mean, log_variance = model(torch.randn(1, 3, 9, 16, 16), torch.randn(1, 16, 3, 2, 2))
    (shown.square().mean() + mean.square().mean() + log_variance.square().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
