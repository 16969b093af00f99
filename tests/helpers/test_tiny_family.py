"""The small family: the same bytes from the same seed, complete, small, and fitting together."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open

from tests.helpers.tiny_family import captions, make_tiny, tiny_tokenizer, tiny_vae
from turbo_core.checkpoint import inspect
from turbo_core.tinywan.text import MARKER, TEXT_CONFIG
from turbo_core.vae import decode_video, load_vae


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return {path.name: path for path in make_tiny(tmp_path_factory.mktemp("tiny"))}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(family, tmp_path):
    again = {path.name: digest(path) for path in make_tiny(tmp_path / "again")}
    assert again == {name: digest(path) for name, path in family.items()}
    assert not torch.equal(tiny_vae(0)["conv2.weight"], tiny_vae(1)["conv2.weight"])


def test_the_family_is_complete_and_small(family):
    expected = {
        "tiny_wan_vae.safetensors",
        "TinyWan2.1_VAE.pth",
        "tiny_umt5.safetensors",
        "tiny_umt5_enc.pth",
        "spiece.model",
    }
    assert expected < set(family)
    assert sum(name.startswith("TinyWan2.") and name.endswith("-quant.pth") for name in family) == 3
    assert sum(path.stat().st_size for path in family.values()) < 50e6
    assert all(path.stat().st_mode & 0o044 for path in family.values())  # readable by others, as any download


def test_the_text_width_is_what_the_dits_expect(family):
    dits = [path for name, path in family.items() if "umt5" not in name and "vae" not in name.lower()]
    for path in dits:
        if path.name != "spiece.model":
            assert inspect(path).text_dim == TEXT_CONFIG["d_model"]


def test_the_text_encoder_carries_what_comfyui_reads(family):
    """ComfyUI tells umT5-xxl by the marker's 10240 rows and takes the sizes from umt5xxl_model_config."""
    with safe_open(family["tiny_umt5.safetensors"], "pt") as file:
        assert json.loads(file.metadata()["config"])["umt5xxl_model_config"] == TEXT_CONFIG
        assert file.get_slice(MARKER).get_shape() == [10240, 1]
        assert file.get_tensor("spiece_model").numpy().tobytes() == family["spiece.model"].read_bytes()


def test_the_vae_paints_something(family):
    vae = load_vae(family["tiny_wan_vae.safetensors"])
    video = decode_video(vae, torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert 0.2 < video.std() < 0.7  # neither grey nor black and white
    assert (video.abs() == 1).float().mean() < 0.1
    still = decode_video(vae, torch.zeros(1, 16, 2, 4, 4))
    assert (video - still).abs().mean() > 0.2  # the latent is what it paints


def test_the_tokenizer_covers_its_captions_with_few_tokens():
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceProcessor(model_proto=tiny_tokenizer())
    assert tokenizer.get_piece_size() == TEXT_CONFIG["vocab_size"]
    assert (tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.unk_id(), tokenizer.bos_id()) == (0, 1, 2, -1)
    caption = captions()[0]
    assert len(tokenizer.encode(caption)) < len(caption.split()) * 2
    assert tokenizer.decode(tokenizer.encode(caption)) == caption
