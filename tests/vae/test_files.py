"""Files of the Wan VAE: names, widths, repacks, numbers as ComfyUI's own Wan VAE computes them, wrong files."""

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.tiny_family import tiny_vae
from turbo_core.errors import TurboError
from turbo_core.vae import decode_video, encode_video, load_vae
from turbo_core.vae.files import diffusers_name


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    path = tmp_path_factory.mktemp("vae") / "TinyWan2.1_VAE.pth"
    torch.save(tiny_vae(), path)
    return load_vae(path)


def wave(*shape):
    return torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * 0.7).float().view(shape)


def test_decode_equals_comfyui(vae):
    """Golden numbers: ComfyUI 0.33's comfy.ldm.wan.vae.WanVAE and latent_formats.Wan21 on tiny_vae(0)."""
    video = decode_video(vae, wave(1, 16, 3, 4, 6))
    near = {"atol": 2e-5, "rtol": 0}
    assert video.shape == (1, 3, 9, 32, 48)
    torch.testing.assert_close(video[0, :, 0, 5, 7], torch.tensor([0.068198, -0.064970, 0.446978]), **near)
    torch.testing.assert_close(video[0, :, 1, 0, 47], torch.tensor([0.069389, -0.379955, 0.146812]), **near)
    torch.testing.assert_close(video[0, :, 8, 31, 11], torch.tensor([-0.315227, -0.387277, -0.011952]), **near)
    assert video.mean().item() == pytest.approx(-0.163571, abs=1e-5)
    assert video.std().item() == pytest.approx(0.392992, abs=1e-5)
    assert video.abs().max() == 1  # clamped


def test_encode_equals_comfyui(vae):
    latent = encode_video(vae, wave(1, 3, 9, 32, 48))
    assert latent.shape == (1, 16, 3, 4, 6)
    near = {"atol": 2e-5, "rtol": 0}
    first = torch.tensor([0.195013, 0.482794, 0.507422, -0.015637])
    last = torch.tensor([0.341129, 0.549607, -0.209664, 0.485781])
    torch.testing.assert_close(latent[0, :4, 0, 0, 0], first, **near)
    torch.testing.assert_close(latent[0, 12:, 2, 3, 5], last, **near)


def test_every_name_is_official_and_has_one_of_diffusers(vae):
    assert set(vae.state_dict()) == set(tiny_vae())
    theirs = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan").AutoencoderKLWan
    with torch.device("meta"):
        assert {diffusers_name(name) for name in tiny_vae()} == set(theirs(base_dim=8, z_dim=16).state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_repacks_load_alike(vae, dtype, tmp_path):
    state = {name: value.to(dtype) for name, value in tiny_vae().items()}
    save_file(state, tmp_path / "wan_2.1_vae.safetensors")
    save_file({diffusers_name(name): value for name, value in state.items()}, tmp_path / "diffusers.safetensors")
    for name in ("wan_2.1_vae.safetensors", "diffusers.safetensors"):
        found = load_vae(tmp_path / name).state_dict()
        assert all(torch.equal(found[key], value.float()) for key, value in state.items()), name


def foreign(kind):
    state = tiny_vae()
    if kind == "Wan 2.2 5B":
        state["decoder.conv1.weight"] = torch.zeros(32, 48, 3, 3, 3)
    elif kind == "image VAE":
        state = {"decoder.conv_in.weight": torch.zeros(8, 4, 3, 3), "decoder.mid.block_1.norm1.weight": torch.zeros(8)}
    elif kind == "not a Wan VAE":
        state = {"blocks.0.self_attn.q.weight": torch.zeros(4, 4)}
    elif kind == "lacks 1 of":
        del state["decoder.middle.1.proj.bias"]
    elif kind == "single number":
        state = {
            "decoder.conv1.weight": state["decoder.conv1.weight"],
            "decoder.middle.0.residual.0.gamma": torch.ones(8),
        }
        state["decoder.head.0.gamma"] = torch.tensor(1.0)
    elif kind == "has 1 unknown":
        state["decoder.upsamples." + "9" * 5000 + ".x"] = torch.ones(1)
    elif kind == "has shape":
        state["conv2.weight"] = torch.zeros(16, 8, 1, 1, 1)
    return state


@pytest.mark.parametrize(
    "kind", ["Wan 2.2 5B", "image VAE", "not a Wan VAE", "lacks 1 of", "has shape", "single number", "has 1 unknown"]
)
def test_another_vae_is_named_with_the_cure(kind, tmp_path):
    save_file(foreign(kind), tmp_path / "other.safetensors")
    with pytest.raises(TurboError, match=rf"other\.safetensors.*{kind}.*Wan2\.1_VAE\.pth"):
        load_vae(tmp_path / "other.safetensors")
