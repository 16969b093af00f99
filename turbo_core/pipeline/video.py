"""Pictures and videos in and out: read an image, write an MP4 and a contact sheet."""

import json
import os
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import TurboError, missing_library, quoted, shown
from ..files import check_free, written_aside
from .sizes import FPS

VIDEO_SUFFIXES = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov"}  # to the container's name
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF")
# IPTC's word for what a model made, which laws on synthetic media ask for
ORIGIN = {"software": "ComfyUI-TurboWan", "digitalSourceType": "trainedAlgorithmicMedia"}
_MATROSKA = b"\x1a\x45\xdf\xa3"  # what such a file begins with; MP4 and MOV are of one kind
MOST_PIXELS = 100_000_000  # 300 MB; the largest cameras have as many


def read_image(path) -> torch.Tensor:
    """An image file as uint8 [3, H, W], turned upright by its EXIF tag; of 16 bits the upper eight.

    Raises TurboError when it is none of IMAGE_FORMATS, whatever its name, or has more than MOST_PIXELS.
    """
    image_module = _pillow()
    from PIL import ImageOps

    path = Path(path)
    if not os.path.isfile(path):
        raise TurboError(f"image: {path} is not a file. Check the path.")
    try:
        # formats by name: for others Pillow starts programs, Ghostscript for one
        image_module.init()
        formats = [name for name in IMAGE_FORMATS if name in image_module.OPEN]  # Pillow before 11.3 has no AVIF
        with image_module.open(path, formats=formats) as image:
            if image.width * image.height > MOST_PIXELS:
                raise TurboError(
                    f"image: {path} is {image.width} x {image.height}. Expected at most {MOST_PIXELS:,} pixels: scale "
                    "it down, a video has a million."
                )
            image = _in_eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    except TurboError:
        raise
    except Exception as error:  # each of Pillow's decoders has its own
        raise TurboError(f"image: {path} cannot be read ({shown(error, 200)}). Save it as PNG or JPEG.") from error
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


def _in_eight_bits(image):
    """An image of 16 bits a pixel, grey then, in eight; others as they are. Pillow itself makes white of it."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
    return _pillow().fromarray(values.astype(np.uint8))


def prepare_image(image: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """uint8 [3, H, W] stretched to float32 [3, height, width] in [-1, 1] by antialiased bilinear resizing.

    Resized as 8-bit pixels and normalized after that, as the reference does it with torchvision (same pixels);
    the aspect ratio is not kept, see adaptive_size.
    """
    resized = F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
    return (resized.float() / 255 - 0.5) / 0.5


def to_frames(video: torch.Tensor) -> torch.Tensor:
    """Video float [3, T, H, W] in [-1, 1] -> uint8 [T, H, W, 3] on the CPU."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()


def write_video(
    path, frames: torch.Tensor, fps: int = FPS, made: dict | None = None, finish=None, sweeps: bool = True
) -> None:
    """Write uint8 frames [T, H, W, 3] as H.264, yuv420p. The file appears only when it is complete.

    made: how it came about, kept in the file as JSON for read_made; says too that the video is synthetic. finish:
    callable (path, target), the last to touch the file before it appears as target. sweeps: see files.written_aside.
    """
    check_video_path(path)
    av = _pyav()
    try:
        container_format = VIDEO_SUFFIXES[Path(path).suffix.lower()]
        with written_aside(path, sweeps) as aside:
            with av.open(str(aside), "w", format=container_format) as container:
                stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "17"})
                stream.height, stream.width = frames.shape[1:3]
                stream.pix_fmt = "yuv420p"
                if made is not None:
                    container.metadata["comment"] = json.dumps({**ORIGIN, **made}, ensure_ascii=False)
                for frame in frames.numpy():
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                container.mux(stream.encode())
            if finish is not None:
                finish(aside, path)
    except (av.error.FFmpegError, OSError) as error:
        raise TurboError(f"Could not write {path} ({error}). Check the folder's rights and the free space.") from error


def read_made(path) -> dict | None:
    """What write_video kept in a file, None where it is no video of ours. Raises TurboError where it is no video."""
    with opened_video(path) as container:
        comment = container.metadata.get("comment") or container.metadata.get("COMMENT", "")
    try:
        made = json.loads(comment)
    except (ValueError, RecursionError):
        return None
    return made if isinstance(made, dict) and made.get("software") == ORIGIN["software"] else None


@contextmanager
def opened_video(path):
    """A video file as PyAV's container, for reading. Raises TurboError where it, or its use within the block, fails.

    The format is said, not guessed: FFmpeg knows playlists and scripts by their contents, whatever they are called,
    and opens the files and addresses that those name. What is no file, such as an address, is not opened either.
    """
    av = _pyav()
    if not os.path.isfile(path):
        raise TurboError(f"video: {shown(path)} is not a file. Check the path.")
    try:
        with open(path, "rb") as file:
            kind = "matroska" if file.read(4) == _MATROSKA else "mp4"
        options = {"protocol_whitelist": "file"}
        with av.open(f"file:{os.path.abspath(path)}", format=kind, options=options, metadata_errors="replace") as video:
            yield video
    except (av.error.FFmpegError, OSError, ValueError, IndexError, MemoryError) as error:
        if isinstance(error, TurboError):
            raise
        raise TurboError(f"video: {path} cannot be read ({shown(error, 200)}). Save it as MP4.") from error


def write_contact_sheet(path, frames: torch.Tensor, count: int = 9, max_width: int = 1920) -> None:
    """Write up to count evenly spaced frames of uint8 [T, H, W, 3] as one grid image, in reading order."""
    check_sheet_path(path)
    image_module = _pillow()
    count = min(count, len(frames))
    picks = torch.linspace(0, len(frames) - 1, count).round().long()
    columns = min(3, count)
    rows = -(-count // columns)
    height, width = frames.shape[1:3]
    sheet = torch.zeros(rows * height, columns * width, 3, dtype=torch.uint8)
    for place, frame in enumerate(frames[picks]):
        y, x = place // columns * height, place % columns * width
        sheet[y : y + height, x : x + width] = frame
    image = image_module.fromarray(sheet.numpy())
    if image.width > max_width:
        image = image.resize((max_width, max(1, round(image.height * max_width / image.width))))
    try:
        with written_aside(path) as aside:
            image.save(aside, format=image_module.registered_extensions()[Path(path).suffix.lower()])
    except OSError as error:
        raise TurboError(f"Could not write {path} ({error}). Check the folder's rights and the free space.") from error


def check_video_path(path) -> None:
    """Raise TurboError, before any work, when no video could be written there; makes the folder."""
    known = ", ".join(VIDEO_SUFFIXES)
    if Path(path).suffix.lower() not in VIDEO_SUFFIXES:
        raise TurboError(
            f"The output must end in {known}, got {quoted(Path(path).name)}: name it {shown(Path(path).stem)}.mp4."
        )
    _pyav()
    check_place(path)


def check_sheet_path(path) -> None:
    """The same for a contact sheet."""
    image_module = _pillow()
    known = image_module.registered_extensions()  # reads all formats, those that cannot be written too
    if known.get(Path(path).suffix.lower()) not in image_module.SAVE:
        raise TurboError(f"The contact sheet {path} is of no known image format: name it {Path(path).stem}.png.")
    check_place(path)


def check_place(path) -> None:
    """The same for a file of any kind."""
    path = Path(path)
    if os.path.isdir(path):
        raise TurboError(f"The output {path} is a folder: name a file in it.")
    check_free(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "a file has that name" if isinstance(error, FileExistsError) else error
        raise TurboError(f"Could not make the folder {path.parent} ({why}). Choose another one.") from error
    if not os.access(path.parent, os.W_OK):
        raise TurboError(f"There is no right to write to the folder {path.parent}. Choose another one.")


def _pillow():
    try:
        from PIL import Image
    except ImportError as error:
        raise missing_library("pillow", "Reading or writing images") from error
    return Image


def _pyav():
    try:
        import av
    except ImportError as error:
        raise missing_library("av", "Writing a video") from error
    return av
