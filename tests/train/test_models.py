"""The networks for training compute what the networks for running compute, from the same state dict."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from turbo_core.pipeline.vae import LATENT_MEAN, LATENT_STD
from turbo_core.sla import sparse_linear_attention
from turbo_core.tinywan.vae import match_statistics
from turbo_core.tinywan.vae import train as train_vae
from turbo_core.tinywan.wan_vae import WanVAE
from turbo_core.train.dit import TrainWan, sparse_linear, trainable
from turbo_core.wan import WanModel

SIZES = {"dim": 128, "ffn_dim": 192, "num_heads": 2, "num_layers": 2, "text_dim": 24}


def model(sla=True):
    torch.manual_seed(0)
    net = TrainWan(**SIZES, sla=sla)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net


def inputs():
    # 9 x 8 x 4 tokens: two whole query blocks and a ragged one; prompts of different lengths
    x, context, lengths = torch.randn(2, 16, 9, 16, 8), torch.randn(2, 11, 24), torch.tensor([11, 6])
    context[1, 6:] = 0
    return x, torch.tensor([300.0, 850.0]), context, lengths


@pytest.mark.parametrize("topk", [None, 0.3], ids=["dense", "sparse"])
def test_velocity_is_that_of_the_model_for_running(topk):
    net, (x, time, context, lengths) = model(), inputs()
    twin = WanModel.from_state_dict(net.state_dict(), num_heads=2)
    ours = net(x, time, context, lengths, topk=topk)
    theirs = twin(x, time, F.pad(context, (0, 0, 0, 512 - 11)), topk=topk)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_what_follows_a_prompt_does_not_matter():
    net, (x, time, context, lengths) = model(), inputs()
    other = context.clone()
    other[1, 6:] = 7.0
    assert torch.equal(net(x, time, context, lengths), net(x, time, other, lengths))


def test_some_frames_keep_their_place_in_time():
    net, (x, time, context, lengths) = model(), inputs()
    frames = torch.tensor([0, 4, 8])
    some = x[:, :, frames]
    assert torch.equal(net(x, time, context, lengths), net(x, time, context, lengths, frames=torch.arange(9)))
    apart = net(some, time, context, lengths, frames=frames) - net(some, time, context, lengths)
    assert apart.abs().max() > 1e-3


def test_recomputing_blocks_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        net, args = model(), inputs_of(seed=1)
        net.checkpointing = checkpointing
        net(*args, topk=0.3).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert torch.equal(*gradients)
    assert gradients[0].isfinite().all()


def inputs_of(seed):
    torch.manual_seed(seed)
    return inputs()


@pytest.mark.parametrize("tokens", [128, 200, 70])  # whole blocks; both kinds ragged; fewer than one query block
def test_sparse_attention_with_a_gradient(tokens):
    q, k, v = (torch.randn(2, tokens, 3, 64, requires_grad=True) for _ in range(3))
    weight, bias = torch.randn(64, 64), torch.randn(64)
    ours = sparse_linear(q, k, v, weight, bias, 0.5)
    torch.testing.assert_close(ours, sparse_linear_attention(q, k, v, weight, bias, 0.5), atol=1e-4, rtol=1e-4)
    ours.sum().backward()
    assert all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in (q, k, v))


def test_proj_l_that_is_added_starts_as_nothing():
    net = model(sla=False)
    grown = trainable(net.state_dict(), num_heads=2, sla=True)
    args = inputs()
    assert grown.has_sla and all(p.requires_grad for p in grown.parameters())
    torch.testing.assert_close(grown(*args, topk=1.0), net(*args), atol=1e-5, rtol=1e-4)


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
