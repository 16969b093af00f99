"""Images in, videos and contact sheets out."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from turbo_core.errors import TurboError
from turbo_core.pipeline.video import (
    check_sheet_path,
    prepare_image,
    read_image,
    to_frames,
    write_contact_sheet,
    write_video,
)


def moving_square(frames=9, height=48, width=64):
    video = torch.zeros(frames, height, width, 3, dtype=torch.uint8)
    for i in range(frames):
        video[i, 8:24, 4 * i : 4 * i + 16] = torch.tensor([220, 40, 40], dtype=torch.uint8)
    return video


def read_video(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
        return torch.stack(frames), stream.average_rate, stream.codec_context.name, stream.codec_context.pix_fmt


def test_video_comes_back(tmp_path):
    frames = moving_square()
    write_video(tmp_path / "new folder" / "out.mp4", frames)
    back, rate, codec, pixels = read_video(tmp_path / "new folder" / "out.mp4")
    assert (rate, codec, pixels) == (16, "h264", "yuv420p")
    assert back.shape == frames.shape
    assert (back.float() - frames.float()).abs().mean() < 3  # lossy, chroma at half resolution


class InterruptedFrames:
    """Frames whose second one never comes because of Ctrl-C."""

    shape = (9, 48, 64, 3)

    def numpy(self):
        yield moving_square()[0].numpy()
        raise KeyboardInterrupt


def test_an_interrupted_write_leaves_nothing_and_keeps_the_old_file(tmp_path):
    target = tmp_path / "out.mp4"
    target.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_video(target, InterruptedFrames())
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    assert target.read_bytes() == b"old"


def test_unwritable_targets_are_named(tmp_path):
    with pytest.raises(TurboError, match=r"must end in .mp4.*name it out\.mp4"):
        write_video(tmp_path / "out.gif", moving_square())
    (tmp_path / "file").write_text("")
    with pytest.raises(TurboError, match=r"Could not make the folder .*\(a file has that name\)"):
        write_video(tmp_path / "file" / "out.mp4", moving_square())
    with pytest.raises(TurboError, match=r"name it sheet\.png"):
        write_contact_sheet(tmp_path / "sheet.unknown", moving_square())
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(TurboError, match="is a folder"):
        write_contact_sheet(tmp_path / "folder.png", moving_square())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_contact_sheet_holds_first_and_last_frame(tmp_path):
    frames = moving_square(frames=13)
    write_contact_sheet(tmp_path / "sheet.png", frames)
    sheet = read_image(tmp_path / "sheet.png").permute(1, 2, 0)
    assert sheet.shape == (3 * 48, 3 * 64, 3)
    assert torch.equal(sheet[:48, :64], frames[0])
    assert torch.equal(sheet[-48:, -64:], frames[-1])


def test_contact_sheet_of_fewer_frames_than_cells(tmp_path):
    write_contact_sheet(tmp_path / "sheet.png", moving_square(frames=1))
    assert read_image(tmp_path / "sheet.png").shape == (3, 48, 64)


def test_image_is_upright_and_without_alpha(tmp_path):
    image = Image.new("RGBA", (30, 20), (255, 0, 0, 128))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").shape == (3, 30, 20)


def test_unreadable_images_are_named(tmp_path):
    with pytest.raises(TurboError, match="not a file"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(TurboError, match=r"text\.png cannot be read"):
        read_image(tmp_path / "text.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-60])
    with pytest.raises(TurboError, match=r"cut\.png cannot be read"):
        read_image(tmp_path / "cut.png")


def test_prepared_image_spans_minus_one_to_one_and_averages_when_shrinking():
    image = torch.tensor([0, 255], dtype=torch.uint8).repeat(3, 32, 32)  # columns black, white, black ...
    same = prepare_image(image, 64, 32)
    assert same.unique().tolist() == [-1.0, 1.0]
    small = prepare_image(image, 16, 16)  # antialiased: grey, not stripes
    assert small.abs().max() < 0.1
    levels = (small + 1) * 127.5  # resized as 8-bit pixels, as the reference does
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)


def test_frames_round_and_clamp():
    video = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5]).view(1, 1, 1, 5).expand(3, 1, 1, 5)
    assert to_frames(video)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_sixteen_bits_of_grey_are_not_white(tmp_path):
    Image.fromarray(np.full((8, 6), 20000, np.uint16)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").unique().tolist() == [20000 >> 8]


def test_formats_are_named_whatever_the_suffix(tmp_path):
    """Pillow starts Ghostscript for PostScript."""
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "x.png").write_bytes(text)
    with pytest.raises(TurboError, match=r"x\.png cannot be read.*PNG or JPEG"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bytes_of_an_image_are_an_error_of_ours_or_a_picture(tmp_path, kind):
    """Each decoder has errors of its own: AVIF's is a RuntimeError."""
    path = tmp_path / "x.png"
    Image.new("RGB", (20, 12), (200, 30, 90)).save(path, kind)
    data, failed = path.read_bytes(), 0
    for at in range(4, min(300, len(data)), 3):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
        try:
            assert read_image(path).dtype == torch.uint8
        except TurboError as error:
            assert "x.png" in str(error) and len(str(error)) - len(str(path)) < 400
            failed += 1
    assert failed


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_is_refused_by_its_pixels_before_they_are_unpacked(tmp_path, monkeypatch):
    Image.new("L", (13300, 13300)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(TurboError, match=r"13300 x 13300.*scale it down"):
        read_image(tmp_path / "x.png")


def test_a_sheet_s_format_can_be_written(tmp_path):
    """Found out after all the work, before."""
    for suffix in (".psd", ".xyz"):
        with pytest.raises(TurboError, match=r"name it x\.png"):
            check_sheet_path(tmp_path / f"x{suffix}")


def test_a_pillow_without_avif_reads_the_other_formats(tmp_path, monkeypatch):
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    for suffix in ("bmp", "tif"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"frame.{suffix}")
        assert read_image(tmp_path / f"frame.{suffix}")[0].min() == 255
