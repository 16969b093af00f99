"""The norm between a VAE's convolutions against float64 and its reference, and the whole VAE with it."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.tensors import gaussian
from turbo_core.channels import norm_silu, reference
from turbo_core.dispatch import record
from turbo_core.kernels import norm_silu as kernel
from turbo_core.vae import WanVAE, decode_video

# one row, rows and channels that no tile divides, TinyWan's width, the published ones
SHAPES = [(1, 96), (37, 200), (9, 8), (70, 96), (33, 192), (17, 384)]


def exact(x, gamma):
    x, gamma = x.double(), gamma.double()
    y = F.normalize(x, dim=1, eps=1e-12) * x.shape[1] ** 0.5 * gamma
    return F.silu(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows(shape, dtype):
    x = (gaussian(*shape) * gaussian(shape[0], 1, seed=1).exp()).to(dtype)
    x[0] = 0  # a vector without length stays one
    gamma = (1 + 0.3 * gaussian(1, shape[1], seed=2)[0]).to(dtype)
    found, want = kernel.norm_silu(x, gamma), exact(x, gamma)
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert found.dtype == dtype and (found[0] == 0).all()
    torch.testing.assert_close(found.double(), want, rtol=1.1 * rounding, atol=2e-6)
    other = reference.norm_silu(x, gamma)
    assert (found != other).double().mean() < (1.1 if dtype == torch.float32 else 0.01)  # the same rounding, once


def test_large_float16_does_not_overflow_and_strides_are_read():
    x = (200 * gaussian(8, 2 * 96)).half()[:, ::2]
    assert x.stride(1) == 2 and x.float().square().sum(1).max() > torch.finfo(torch.float16).max
    gamma = torch.ones(96)
    torch.testing.assert_close(kernel.norm_silu(x, gamma).double(), exact(x, gamma), rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_a_batch_of_videos_into_a_part_of_a_larger_tensor():
    x = gaussian(2, 24, 3 * 5, 7).view(2, 24, 3, 5, 7).contiguous(memory_format=torch.channels_last_3d)
    whole = torch.full((2, 24, 5, 5, 7), 3.0).contiguous(memory_format=torch.channels_last_3d)
    gamma = 1 + 0.3 * gaussian(1, 24, seed=2).view(24, 1, 1, 1)
    norm_silu(x, gamma, whole[:, :, 2:])
    assert (whole[:, :, :2] == 3).all()
    torch.testing.assert_close(whole[:, :, 2:].double(), exact(x, gamma.view(1, 24, 1, 1, 1)), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_vae_decodes_the_same_by_the_kernel(monkeypatch):
    torch.manual_seed(0)
    vae, latent = WanVAE(8).eval(), torch.randn(1, 16, 2, 3, 2)
    ran, run = [], kernel.norm_silu
    monkeypatch.setattr("turbo_core.channels.fast.norm_silu", lambda *given: ran.append(1) or run(*given))
    found = decode_video(vae, latent)
    assert len(ran) > 50
    record("cpu", "vae", "off for this test")
    try:
        expected = decode_video(vae, latent)
    finally:
        record("cpu", "vae", None)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "wrong", [{"gamma": torch.ones(95)}, {"out": torch.empty(4, 192)[:, ::2]}, {"x": torch.ones(96)}]
)
def test_operands_that_do_not_fit_are_refused(wrong):
    given = {"x": torch.ones(4, 96), "gamma": torch.ones(96), "out": None} | wrong
    with pytest.raises(ValueError, match=r"gamma|out|matrix"):
        kernel.norm_silu(**given)
