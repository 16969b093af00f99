"""Turbo VAE: the pixels of the host's own VAE from its own nodes, in less memory; the VAE that came stays as it was."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.tiny_decoders import tiny_decoder
from turbo_core.errors import TurboError
from turbo_core.tinywan import FILES


@pytest.fixture(scope="module")
def stock(comfy, pack):
    """TinyWan's VAE as the host loads it, in float32: its numbers are then told apart from rounding."""
    path = pack.root / "models" / "tinywan" / FILES["vae"]
    if not path.is_file():
        pytest.skip("this copy comes without models/tinywan")
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)), dtype=torch.float32)


@pytest.fixture
def turbo(pack, stock):
    return pack.nodes["TurboVAE"].execute(stock)[0]


def latent(frames=5, height=6, width=9):
    return torch.randn(1, 16, frames, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_stock_decode_gives_the_same_pixels(turbo, stock, frames):
    from nodes import VAEDecode

    samples = {"samples": latent(frames)}
    ours, theirs = (VAEDecode().decode(vae, samples)[0] for vae in (turbo, stock))
    assert ours.shape == theirs.shape == (4 * frames - 3, 48, 72, 3) and theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_stock_tiled_decode_gives_the_same_pixels(turbo, stock):
    from nodes import VAEDecodeTiled

    samples = {"samples": latent(5, 16, 16)}
    ours, theirs = (VAEDecodeTiled().decode(vae, samples, 64, 16, 8, 8)[0] for vae in (turbo, stock))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


# 6 frames: the host leaves out the last one; 50 pixels: it crops them
@pytest.mark.parametrize("shape", [(1, 48, 64, 3), (6, 48, 64, 3), (9, 50, 64, 3)])
def test_stock_encode_gives_the_same_latents(turbo, stock, shape):
    from nodes import VAEEncode, VAEEncodeTiled

    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = (VAEEncode().encode(vae, pixels)[0]["samples"] for vae in (turbo, stock))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    ours, theirs = (VAEEncodeTiled().encode(vae, pixels, 64, 16, 64, 8)[0]["samples"] for vae in (turbo, stock))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_dtype_that_the_host_chose_stays(comfy, pack, stock):
    half = comfy.sd.VAE(sd=stock.get_sd(), dtype=torch.bfloat16)
    turbo = pack.nodes["TurboVAE"].execute(half)[0]
    assert {p.dtype for p in turbo.first_stage_model.parameters()} == {torch.bfloat16}
    exact, theirs, ours = (vae.decode(latent()).float() for vae in (stock, half, turbo))
    assert (ours - exact).norm() < 1.1 * (theirs - exact).norm()


def test_the_stock_vae_stays_as_it_was(comfy, pack, stock):
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in stock.get_sd().items()}
    network, patcher, estimate = stock.first_stage_model, stock.patcher, stock.memory_used_decode
    turbo = pack.nodes["TurboVAE"].execute(stock)[0]
    turbo.decode(latent())
    turbo.patcher.model.to("meta")  # whatever happens to ours
    assert stock.first_stage_model is network and stock.patcher is patcher and stock.memory_used_decode is estimate
    for name, tensor in stock.get_sd().items():
        place, values = before[name]
        assert tensor.data_ptr() == place and torch.equal(tensor, values)
    assert stock.decode(latent()).isfinite().all()


def test_its_memory_is_told_to_the_host_and_is_less(turbo, stock, monkeypatch):
    from turbo_core.vae.memory import piece_bytes

    shape = (1, 16, 21, 60, 104)
    assert piece_bytes("decode", 480 * 832, 1, 8, torch.float32) < turbo.memory_used_decode(shape, torch.float32)
    assert turbo.memory_used_decode(shape, torch.float32) < stock.memory_used_decode(shape, torch.float32)
    asked = []
    import comfy.model_management as management

    load = management.load_models_gpu

    def seen(models, memory_required=0, **settings):
        asked.append((models, memory_required))
        return load(models, memory_required=memory_required, **settings)

    monkeypatch.setattr(management, "load_models_gpu", seen)
    turbo.decode(latent())
    assert asked == [([turbo.patcher], turbo.memory_used_decode(latent().shape, torch.float32))]


def test_a_device_that_runs_full_is_the_hosts_case_after_fewer_frames(pack, turbo, stock, monkeypatch):
    import comfy.model_management as management

    network, tried = turbo.first_stage_model, []
    passed = type(network).decode_piece

    def decode_piece(self, piece, past):
        tried.append(piece.shape[2:])
        if piece[0, 0].numel() > 32 * 32:
            raise management.OOM_EXCEPTION("full")
        return passed(self, piece, past)

    monkeypatch.setattr(type(network), "decode_piece", decode_piece)
    large = latent(2, 40, 32)
    assert turbo.decode(large).shape == (1, 5, 320, 256, 3)
    assert max(size[1] * size[2] for size in tried[1:]) <= 32 * 32, "the host's own tiles"


def test_twice_is_once(pack, turbo):
    assert pack.nodes["TurboVAE"].execute(turbo)[0] is turbo


def test_other_vaes_are_refused_with_the_cure(comfy, pack, stock):
    import copy

    other = copy.copy(stock)
    other.get_sd = lambda: {"decoder.conv_in.weight": torch.zeros(8, 4, 3, 3)}
    with pytest.raises(TurboError.__mro__[1], match=r"the VAE that is connected is an image VAE.*wan_2\.1_vae"):
        pack.nodes["TurboVAE"].execute(other)
    with pytest.raises(ValueError, match="Turbo VAE got no VAE but dict: connect one, from Load VAE"):
        pack.nodes["TurboVAE"].execute({})


@pytest.fixture(scope="module")
def host_tiny(comfy):
    """The host's own TAEHV for 16 latent channels, random weights under its names, pixels around grey."""
    from comfy.taesd.taehv import TAEHV

    model, weights = TAEHV(16, parallel=True), tiny_decoder()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("encoder.") for name in missing)
    return model.eval(), model.state_dict()


@pytest.mark.parametrize("name", ["taew2_1.safetensors", "lighttaew2_1.safetensors"])
@pytest.mark.parametrize("parallel", [True, False])
def test_tiny_decoders_are_the_host_s(host_tiny, name, parallel, tmp_path):
    """A whole file as published, with its encoder; LightTAE gets the latents of the VAE, TAEHV those of the DiT."""
    from comfy.latent_formats import Wan21

    from turbo_core.vae import decode_video, load_fast

    model, state = host_tiny
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / name)
    sampled = latent(3)
    model.parallel = parallel
    with torch.no_grad():
        expected = model.decode(Wan21().process_out(sampled) if "light" in name else sampled) * 2 - 1
    assert expected.std() > 0.1
    found = decode_video(load_fast(tmp_path / name), sampled)
    torch.testing.assert_close(found, expected.clamp(-1, 1), atol=1e-5, rtol=0)


def test_the_benchmark_decodes_by_the_host_s_own_vae(comfy, pack, monkeypatch):
    from turbo_core.bench import rivals
    from turbo_core.vae import decode_video, load_vae

    path, sampled = pack.root / "models" / "tinywan" / FILES["vae"], latent(2)
    monkeypatch.setenv("COMFYUI_DIR", str(Path(comfy.__path__[0]).parent))
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    video = rivals.host_decode(rivals.host_vae(path, torch.device("cpu")), sampled)
    assert (video - decode_video(load_vae(path), sampled)[0]).norm() < 0.02 * video.norm()
