"""A device that runs full: fewer frames a piece, then tiles, then an error; and how much the pieces take."""

import pytest
import torch

from turbo_core.devices import OutOfMemory
from turbo_core.vae import WanVAE, coding, decode_each, decode_video, encode_video, memory
from turbo_core.vae.memory import fits, frames_of_a_piece, piece_bytes


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return WanVAE(8).eval().requires_grad_(False)


def holding(monkeypatch, most):
    """A device on which one pass holds that many latent pixels; seen: those of each pass that was tried."""
    passed, seen = WanVAE.decode_piece, []

    def decode_piece(self, latent, past):
        seen.append(latent[0, 0].numel())
        result = passed(self, latent, past)  # what a pass did before it failed must leave no trace
        if seen[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return result

    monkeypatch.setattr(WanVAE, "decode_piece", decode_piece)
    monkeypatch.setattr(coding, "frames_of_a_piece", lambda *_: 4)
    return seen


def test_a_piece_that_is_too_large_is_cut_and_the_numbers_stay(vae, monkeypatch):
    latent = torch.randn(1, 16, 9, 4, 4)
    expected = decode_video(vae, latent)
    seen = holding(monkeypatch, 16)
    told = []
    found = torch.cat(decode_each(vae, latent, lambda piece: piece, progress=lambda *at: told.append(at)), 2)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert seen == [16, 64, 32, *[16] * 8]
    assert told == [(n, 9) for n in range(1, 10)]


def test_a_picture_that_is_too_large_goes_in_tiles(vae, monkeypatch, caplog):
    latent = torch.randn(1, 16, 2, 34, 8)
    expected = decode_video(vae, latent, tiled=True)
    seen = holding(monkeypatch, 32 * 8)
    assert torch.equal(decode_video(vae, latent), expected)
    assert seen == [34 * 8, 32 * 8, 32 * 8, 10 * 8, 10 * 8] and "in tiles now" in caplog.text


def test_a_picture_that_main_memory_does_not_hold_goes_in_tiles_before_it_is_tried(vae, monkeypatch, caplog):
    """No error would say so: the system ends the process."""
    latent, video = torch.randn(1, 16, 2, 40, 36), torch.randn(1, 3, 5, 320, 288)
    decoded, encoded = decode_video(vae, latent, tiled=True), encode_video(vae, video, tiled=True)
    least = {work: int(piece_bytes(work, 320 * 288, 1, 8, torch.float32) / 0.7) for work in ("decode", "encode")}
    for work, run in (("decode", lambda: decode_video(vae, latent)), ("encode", lambda: encode_video(vae, video))):
        for free, tiled in ((least[work] * 0.98, True), (least[work] * 1.02, False)):
            monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
            caplog.clear()
            same = torch.equal(run(), decoded if work == "decode" else encoded)
            assert (same, "in tiles" in caplog.text) == (tiled, tiled)
    assert fits("decode", 1 << 40, 96, torch.float32, "cuda")  # a card tells, of what it really takes


def test_memory_that_is_not_enough_for_a_tile_is_an_error_with_the_cure(vae, monkeypatch):
    holding(monkeypatch, 0)
    with pytest.raises(OutOfMemory, match=r"CUDA out of memory.*one latent frame of a tile.*smaller size"):
        decode_video(vae, torch.randn(1, 16, 2, 4, 4))


def test_other_errors_are_not_taken_for_full_memory(vae, monkeypatch):
    monkeypatch.setattr(WanVAE, "decode_piece", lambda *_: (_ for _ in ()).throw(RuntimeError("cuDNN error")))
    with pytest.raises(RuntimeError, match="cuDNN error"):
        decode_video(vae, torch.randn(1, 16, 2, 4, 4))


def test_encoding_runs_full_alike(vae, monkeypatch):
    video = torch.rand(1, 3, 17, 16, 16)
    expected, passed = encode_video(vae, video), WanVAE.encode_piece

    def encode_piece(self, piece, past):
        if piece.shape[2] > 4:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return passed(self, piece, past)

    monkeypatch.setattr(WanVAE, "encode_piece", encode_piece)
    torch.testing.assert_close(encode_video(vae, video), expected, atol=1e-6, rtol=1e-6)


def test_pieces_follow_from_the_memory():
    """The published width at 480p in bf16: one latent frame takes 3 GB, four take 5.8."""
    wish = "decode", 832 * 480, 96, torch.bfloat16
    assert [frames_of_a_piece(*wish, "cuda", free=n * 10**9) for n in (0, 4, 6, 7, 9, 80)] == [1, 1, 2, 3, 4, 4]
    assert frames_of_a_piece(*wish, "cpu", free=80 * 10**9) == 1, "more was no faster there"
    assert frames_of_a_piece("decode", 128 * 128, 8, torch.float32, "cpu") == 4
    assert frames_of_a_piece("decode", 1920 * 1088, 96, torch.bfloat16, "cuda", free=130 * 10**9) == 2, "2^31 numbers"
