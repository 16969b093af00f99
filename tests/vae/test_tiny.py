"""Tiny decoders: the network against its published form in float64, cuts of a video, files, and drafts by them."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tests.helpers.tiny_decoders import tiny_decoder
from tests.helpers.tiny_family import tiny_vae
from turbo_core.errors import TurboError
from turbo_core.vae import LATENT_MEAN, LATENT_STD, TinyDecoder, WanVAE, coding, decode_video, load_fast, load_vae
from turbo_core.vae.coders import Coders
from turbo_core.vae.memory import piece_bytes

MEAN, STD = (torch.tensor(row).view(1, -1, 1, 1, 1) for row in (LATENT_MEAN, LATENT_STD))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "taew2_1.safetensors"
    save_file(tiny_decoder(), path)
    return path


def frame_by_frame(state, latent):
    """The published network in float64, a frame at a time: [16, T, H, W] -> [3, 4T - 3, 8H, 8W] in [-1, 1]."""
    state = {name: tensor.double() for name, tensor in state.items()}
    before = {}

    def through(frame, index):
        if index == 23:
            return [frame]
        weight, bias = (state.get(f"decoder.{index}.{name}") for name in ("weight", "bias"))
        if index in (2, 21):
            return through(frame.relu(), index + 1)
        if weight is not None:
            return through(F.conv2d(frame, weight, bias, padding=1), index + 1)
        if index in (6, 12, 18):
            return through(F.interpolate(frame, scale_factor=2), index + 1)
        if index in (7, 13, 19):
            grown = F.conv2d(frame, state[f"decoder.{index}.conv.weight"])
            return [one for part in grown.split(frame.shape[1], 1) for one in through(part, index + 1)]
        y = torch.cat([frame, before.get(index, torch.zeros_like(frame))], 1)
        before[index] = frame
        for layer in (0, 2, 4):
            y = F.conv2d(y, *(state[f"decoder.{index}.conv.{layer}.{n}"] for n in ("weight", "bias")), padding=1)
            y = y.relu() if layer < 4 else (y + frame).relu()
        return through(y, index + 1)

    frames = [one for z in latent.double().unbind(1) for one in through(3 * torch.tanh(z[None] / 3), 1)]
    return (torch.cat(frames[3:]).transpose(0, 1) * 2 - 1).clamp(-1, 1)


# one frame; two latent frames; more, of ragged sizes
@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 3, 5), (5, 2, 3)])
def test_it_is_the_published_network(file, shape):
    latent = torch.randn(1, 16, *shape, generator=torch.Generator().manual_seed(0))
    expected = frame_by_frame(tiny_decoder(), latent[0])
    found = decode_video(load_fast(file), latent)[0]
    assert found.shape == (3, 4 * shape[0] - 3, 8 * shape[1], 8 * shape[2])
    assert expected.std() > 0.1 and (expected.abs() < 1).double().mean() > 0.5
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_any_cut_gives_the_same_numbers_and_a_batch_the_single_ones(file, frames, monkeypatch):
    decoder, latent = load_fast(file), torch.randn(2, 16, 6, 4, 3)
    monkeypatch.setattr(coding, "frames_of_a_piece", lambda *_: 5)
    whole = decode_video(decoder, latent)
    monkeypatch.setattr(coding, "frames_of_a_piece", lambda *_: frames)
    torch.testing.assert_close(decode_video(decoder, latent), whole, atol=2e-6, rtol=0)
    torch.testing.assert_close(decode_video(decoder, latent[1:]), whole[1:], atol=2e-6, rtol=0)


def test_lighttae_takes_latents_as_the_vae_makes_them(file, tmp_path):
    save_file(tiny_decoder(), tmp_path / "lighttaew2_1.safetensors")
    latent = torch.randn(1, 16, 2, 4, 4)
    light = decode_video(load_fast(tmp_path / "lighttaew2_1.safetensors"), latent)
    torch.testing.assert_close(light, decode_video(load_fast(file), latent * STD + MEAN), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "dtype", "raw"),
    [
        ("taew2_1.pth", torch.float32, False),
        ("LightTAEW2_1.safetensors", torch.float16, True),
        ("draft.safetensors", torch.float16, False),
        ("draft.safetensors", torch.float32, True),
    ],
)
def test_the_name_tells_which_kind_it_is_and_else_the_type(name, dtype, raw, tmp_path, caplog):
    state = {key: tensor.to(dtype) for key, tensor in tiny_decoder().items()}
    torch.save(state, tmp_path / name) if name.endswith("pth") else save_file(state, tmp_path / name)
    assert load_fast(tmp_path / name).takes_raw is raw
    assert ("is taken for" in caplog.text) is name.startswith("draft")


def test_lightvae_is_a_wan_vae_of_another_width(tmp_path):
    save_file(tiny_vae(), tmp_path / "lightvaew2_1.safetensors")
    assert isinstance(load_fast(tmp_path / "lightvaew2_1.safetensors"), WanVAE)


def foreign(kind):
    state, name = tiny_decoder(), "other.safetensors"
    if kind in ("Wan 2.2 5B", "HunyuanVideo 1.5"):
        channels = {"Wan 2.2 5B": 48, "HunyuanVideo 1.5": 32}[kind]
        state["decoder.1.weight"] = torch.zeros(256, channels, 3, 3)
        state |= {"decoder.22.weight": torch.zeros(12, 64, 3, 3), "decoder.22.bias": torch.zeros(12)}
    elif kind == "one of HunyuanVideo":
        name = "taehv.safetensors"
    elif kind == "CogVideoX":
        name = "taecvx.safetensors"
    elif kind == "12 numbers a pixel":
        state["decoder.22.weight"] = torch.zeros(12, 64, 3, 3)
    elif kind == "larger kind":
        state = {"decoder.0.weight": torch.zeros(512, 48, 1, 1), "decoder.1.conv.0.weight": torch.zeros(1024, 1, 7, 7)}
    elif kind == "lacks 1 of":
        del state["decoder.15.conv.4.bias"]
    elif kind == "has shape":
        state["decoder.13.conv.weight"] = torch.zeros(128, 128, 1, 1)
    elif kind == "conv.0.weight has shape":
        state["decoder.9.conv.0.weight"] = torch.zeros(128, 255, 3, 3)
    elif kind == "expected floats":
        state["decoder.22.bias"] = torch.zeros(3, dtype=torch.int8)
    else:
        state = {"decoder.layers.0.weight": torch.zeros(64, 4, 3, 3)}
    return name, state


@pytest.mark.parametrize(
    "kind",
    [
        "Wan 2.2 5B",
        "HunyuanVideo 1.5",
        "one of HunyuanVideo",
        "CogVideoX",
        "12 numbers a pixel",
        "larger kind",
        "lacks 1 of",
        "has shape",
        "conv.0.weight has shape",
        "expected floats",
        "not a tiny video decoder",
    ],
)
def test_the_tiny_decoder_of_another_model_is_named_with_the_cure(kind, tmp_path):
    name, state = foreign(kind)
    save_file(state, tmp_path / name)
    with pytest.raises(TurboError, match=rf"{name}.*{kind}.*taew2_1.*lighttaew2_1"):
        load_fast(tmp_path / name)


def test_a_tiny_decoder_is_no_vae(file):
    with pytest.raises(TurboError, match=r"taew2_1.*tiny decoder.*--vae-fast.*Wan2\.1_VAE"):
        load_vae(file)


def test_what_it_takes_is_far_less_than_the_vae_s():
    wish = 832 * 480, 2
    tiny = piece_bytes("tiny decode", *wish, TinyDecoder.dim, torch.bfloat16)
    assert 2 * tiny < piece_bytes("decode", *wish, 96, torch.bfloat16)


def test_where_the_vae_cannot_be_read_the_next_try_says_so_again(file, tmp_path):
    """The decoder alone would be taken for both, and a picture would meet None."""
    (tmp_path / "vae.pth").write_bytes(b"no VAE")
    both = Coders(tmp_path / "vae.pth", file, encodes=True)
    for _ in range(2):
        with pytest.raises(TurboError, match=r"vae\.pth"):
            both.load_once(lambda name: contextlib.nullcontext(), "cpu", torch.float32)
