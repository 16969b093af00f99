"""Training data: a file that comes back, and batches whose parts belong together."""

import math
import os
import struct

import pytest
import torch

from tests.helpers.training import clips
from turbo_core.errors import TurboError
from turbo_core.pipeline.video import write_video
from turbo_core.tinywan.data import joined
from turbo_core.train import data
from turbo_core.train.videos import read_video


def test_missing_and_wrong_data(tmp_path):
    with pytest.raises(TurboError, match="there is no file"):
        data.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(TurboError, match="cannot be read"):
        data.load(tmp_path / "bad.safetensors")


def test_data_comes_back(tmp_path):
    path = tmp_path / "data.safetensors"
    data.save(clips(), path)
    back = data.load(path)
    assert torch.equal(back.lengths, clips().lengths) and torch.equal(back.latents, clips().latents.bfloat16())
    if os.name != "nt":
        path.with_name("plain").touch()
        assert path.stat().st_mode == path.with_name("plain").stat().st_mode  # others may read it, as any new file


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lengths": torch.tensor([1, 9, 3, 4, 5, 2, 5])}, "lengths goes from 1 to 9, expected 0 to 5"),
        ({"captions_of": torch.full((6, 1), -1)}, "captions_of goes from -1 to -1, expected 0 to 6"),
        ({"captions_of": torch.ones(5, 1, dtype=torch.long)}, "do not fit together"),
        ({"lengths": torch.ones(7)}, "lengths is torch.float32"),
        ({"latents": torch.full((6, 16, 3, 4, 4), math.nan)}, "latents holds NaN"),
        ({"text": torch.ones(7, 5, 0)}, "text is torch.bfloat16"),
        ({"images": torch.ones(6, 20, 3, 4, 2)}, "do not fit together"),
    ],
)
def test_parts_that_do_not_fit_together(tmp_path, change, words):
    path = tmp_path / "data.safetensors"
    data.save(clips()._replace(**change), path)
    with pytest.raises(TurboError, match=rf"data\.safetensors: .*{words}.*Make it again"):
        data.load(path)


def test_data_with_images_come_back_and_join(tmp_path):
    data.save(clips(images=True), tmp_path / "data.safetensors")
    back = data.load(tmp_path / "data.safetensors")
    assert torch.equal(back.images, clips(images=True).images.bfloat16())
    assert joined([back, back]).images.shape[0] == 12
    data.save(clips(), tmp_path / "none.safetensors")
    assert data.load(tmp_path / "none.safetensors").images is None


def test_the_image_of_a_clip_stays_with_it():
    random, told_of = torch.Generator(), clips(images=True)
    told_of = told_of._replace(images=told_of.latents.new_zeros(6, 20, 3, 4, 4) + told_of.latents[:, :1, :, :, :])
    for seed in range(20):
        clean, told = data.batch(told_of, 4, random.manual_seed(seed), kept=(2, 1, 2))
        assert torch.equal(told["y"][:, 3], clean[:, 0])
        frames, rows, columns = (place.tolist() for place in told["places"])
        assert frames in ([0, 1], [0, 2]) and rows in ([0], [1]) and columns == [0, 1]
    _, told = data.batch(clips(), 4, random)
    assert "y" not in told


def test_a_few_frames_of_a_clip_begin_with_its_first():
    random = torch.Generator().manual_seed(0)
    picks = [data.some_places((9, 5, 4), (4, 2, 9), random) for _ in range(50)]
    assert all(len(p) == 4 and p[0] == 0 and (p.diff() > 0).all() and p[-1] < 9 for p, _, _ in picks)
    assert {int(i) for p, _, _ in picks for i in p} == set(range(9))
    assert all(len(rows) == 2 and (rows.diff() > 0).all() for _, rows, _ in picks)
    assert {int(i) for _, rows, _ in picks for i in rows} == set(range(5))  # of these, no one stands apart
    assert all(columns.tolist() == [0, 1, 2, 3] for _, _, columns in picks)


def test_what_a_batch_shows_of_a_clip_are_its_patches_at_those_places():
    whole = clips()
    latents = (
        torch.arange(whole.latents[0].numel(), dtype=torch.float32).view_as(whole.latents[0]).expand(6, -1, -1, -1, -1)
    )
    clean, told = data.batch(whole._replace(latents=latents), 1, torch.Generator().manual_seed(3), kept=(2, 1, 1))
    frames, (row,), (column,) = told["places"]
    inside = latents[:1, :, frames, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    assert torch.equal(clean, inside)


def test_a_caption_of_all_512_tokens_has_no_padding():
    full = data.Data(None, torch.randn(1, 512, 24), torch.tensor([512]), None)
    bias = data.text_rows(full, torch.tensor([0]))["context_bias"]
    assert bias[0, :512].eq(0).all() and bias[0, 512] == -math.inf


def test_a_caption_longer_than_a_prompt_may_be_is_cut_as_a_prompt_is():
    class Encoder:
        device = "cpu"

        def __call__(self, ids, mask):
            return ids[..., None].float()

    text, lengths = data.encode_captions(Encoder(), lambda caption: [*range(2, 2 + len(caption)), 1], ["", 700 * "a"])
    assert text.shape == (2, 512, 1) and lengths.tolist() == [1, 512]
    assert text[1, -2:, 0].tolist() == [512.0, 1.0]  # the end token stays


def _turned(path, degrees):
    """Write into an MP4 how a phone was held: its track's matrix, in 16.16 fixed point (ISO 14496-12, tkhd)."""
    raw = bytearray(path.read_bytes())
    at = raw.index(b"tkhd") + 44
    cosine, sine = round(math.cos(math.radians(degrees)) * 65536), round(math.sin(math.radians(degrees)) * 65536)
    raw[at : at + 36] = struct.pack(">9i", cosine, sine, 0, -sine, cosine, 0, 0, 0, 1 << 30)
    path.write_bytes(raw)


@pytest.mark.parametrize("clockwise, corner", [(0, (0, 0)), (90, (0, 1)), (180, (1, 1)), (270, (1, 0))])
def test_a_video_of_a_phone_is_seen_upright(tmp_path, clockwise, corner):
    frames = torch.zeros(2, 32, 64, 3, dtype=torch.uint8)
    frames[:, :16, :32] = 255  # top left as the sensor saw it
    write_video(tmp_path / "x.mp4", frames)
    _turned(tmp_path / "x.mp4", clockwise)
    shown = read_video(tmp_path / "x.mp4", 1)[0].float().mean(0)
    assert shown.shape == ((64, 32) if clockwise in (90, 270) else (32, 64))
    quarters = shown.unflatten(0, (2, -1)).unflatten(2, (2, -1)).mean((1, 3))
    assert divmod(int(quarters.argmax()), 2) == corner and quarters.max() > 200


def test_a_video_that_lies_askew_is_refused(tmp_path):
    write_video(tmp_path / "x.mp4", torch.zeros(2, 32, 64, 3, dtype=torch.uint8))
    _turned(tmp_path / "x.mp4", 30)
    with pytest.raises(TurboError, match=r"is turned by -29 degrees\. Save it upright"):
        read_video(tmp_path / "x.mp4", 1)


@pytest.mark.parametrize(
    "rate, picked", [(16, [0, 1, 2, 3]), (32, [0, 2, 4, 6]), (48, [0, 3, 6, 9]), (24, [0, 2, 3, 5]), (8, [0, 1, 1, 2])]
)
def test_a_video_of_another_rate_is_shown_at_wans(tmp_path, rate, picked):
    """Frame by frame, 60 a second would be learnt as slow motion."""
    frames = torch.stack([torch.full((32, 32, 3), 20 * i, dtype=torch.uint8) for i in range(12)])
    write_video(tmp_path / "x.mp4", frames, fps=rate)
    shown = read_video(tmp_path / "x.mp4", 4).float().mean((1, 2, 3))
    expected = torch.tensor([20.0 * i for i in picked])
    assert (shown - expected).abs().max() < 9, shown
