"""Convolutions by two thirds of the products, against float64; and the whole VAE with them everywhere."""

import pytest
import torch
import torch.nn.functional as F

from turbo_core.vae import WanVAE, decode_video, encode_video, ops, winograd


# heights that slabs of 8 rows do not divide, one row, a width of two, a batch, more outputs than inputs
@pytest.mark.parametrize("shape", [(1, 5, 4, 3, 19, 12), (2, 3, 3, 1, 8, 2), (1, 4, 9, 2, 1, 6), (1, 2, 2, 1, 16, 10)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_convolution(shape, bias, monkeypatch):
    monkeypatch.setattr(winograd, "_SLAB", 1)
    batch, channels, out, frames, height, width = shape
    random = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, frames + 2, height, width, generator=random)
    weight, shift = torch.randn(out, channels, 3, 3, 3, generator=random), torch.randn(out, generator=random)
    shift = shift if bias else None
    with torch.no_grad():
        found = winograd.conv(x.contiguous(memory_format=torch.channels_last_3d), weight, shift)
    want = F.conv3d(x.double(), weight.double(), shift if shift is None else shift.double(), padding=(0, 1, 1))
    plain = F.conv3d(x, weight, shift, padding=(0, 1, 1))
    assert found.shape == want.shape and found.is_contiguous(memory_format=torch.channels_last_3d)
    assert (found - want).norm() < 4 * (plain - want).norm() + 1e-7 * want.norm()


def test_rows_that_have_their_neighbours_beside_them_get_no_zeros(monkeypatch):
    # a process that decodes some rows of a video of the published width: it crashed there
    if not ops._has_onednn("cpu", torch.float32):
        pytest.skip("this CPU's convolutions are not oneDNN's")
    monkeypatch.setattr(winograd, "_SLAB", 1)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 3, 52, 60, generator=random).contiguous(memory_format=torch.channels_last_3d)
    weight = torch.randn(64, 64, 3, 3, 3, generator=random)
    assert winograd.pays(x, weight)
    with torch.no_grad():
        found = ops.conv(x, weight, None, padding=(0, 0, 1))
    want = F.conv3d(x, weight, padding=(0, 0, 1))
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(found, want, atol=2e-3, rtol=1e-5)


def test_what_is_narrow_small_odd_or_no_3x3x3_is_left_to_the_plain_one():
    x = torch.empty(1, 64, 4, 64, 64, device="meta").to(memory_format=torch.channels_last_3d)
    weight = torch.empty(64, 64, 3, 3, 3, device="meta")
    assert winograd.pays(x, weight)
    assert not winograd.pays(x.contiguous(), weight) and not winograd.pays(x[..., :63], weight)
    assert not winograd.pays(x[:, :, :, :8], weight) and not winograd.pays(x, weight[:32])
    assert not winograd.pays(x, weight[..., :1]) and not winograd.pays(x, weight[:, :, -1:])


def test_the_vae_by_it_is_the_vae(monkeypatch):
    if not ops._has_onednn("cpu", torch.float32):
        pytest.skip("this CPU's convolutions are not oneDNN's")
    torch.manual_seed(0)
    vae = WanVAE(8).eval().requires_grad_(False)
    for name, tensor in vae.named_parameters():
        if tensor.ndim > 3 and not name.endswith("gamma"):
            tensor.normal_(std=0.5 * tensor[0].numel() ** -0.5)
    video = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    latent = encode_video(vae, video)
    shown, used = decode_video(vae, latent), []
    monkeypatch.setattr(winograd, "CHANNELS", 1)
    monkeypatch.setattr(winograd, "PIXELS", 1)
    run = winograd.conv
    monkeypatch.setattr(winograd, "conv", lambda *given: used.append(given[1].shape) or run(*given))
    torch.testing.assert_close(encode_video(vae, video), latent, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decode_video(vae, latent), shown, atol=1e-5, rtol=0)
    assert len(used) > 30
