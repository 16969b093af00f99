"""Video sizes: the presets of the reference, the rules a size must obey, and the nearest size that does."""

import math
import re

from ..errors import TurboError, shown

FPS = 16
STRIDE = 16  # 8 pixels a latent, 2 latents a token

PRESETS = {
    "480p": {"1:1": (640, 640), "4:3": (640, 480), "3:4": (480, 640), "16:9": (832, 480), "9:16": (480, 832)},
    "720p": {"1:1": (960, 960), "4:3": (960, 720), "3:4": (720, 960), "16:9": (1280, 720), "9:16": (720, 1280)},
}


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) from "832x480", "480p" (16:9) or "720p-9:16". Raises TurboError with the nearest valid size."""
    preset = re.fullmatch(r"(\d+p)(?:[-, ]+(\d+:\d+))?", text.strip().lower())
    if preset:
        ratios = PRESETS.get(preset[1])
        size = ratios and ratios.get(preset[2] or "16:9")
        if size is None:
            known = ", ".join(f"{name}-{ratio}" for name, ratios in PRESETS.items() for ratio in ratios)
            raise TurboError(f"Unknown size preset {shown(text)!r}. Known: {known}; or write it like 832x480.")
        return size
    match = re.fullmatch(r"(\d{1,5})\s*[x×]\s*(\d{1,5})", text.strip().lower())
    if not match:
        raise TurboError(f"Size {shown(text)!r} is not understood: write it like 832x480, 480p or 720p-9:16.")
    size = int(match[1]), int(match[2])
    check_size(*size)
    return size


def check_size(width: int, height: int) -> None:
    """Raise TurboError unless both sides are positive multiples of 16 pixels."""
    if width < STRIDE or height < STRIDE or width % STRIDE or height % STRIDE:
        raise TurboError(
            f"Width and height must be multiples of {STRIDE}, got {width}x{height}: "
            f"the nearest is {_nearest(width)}x{_nearest(height)}."
        )


def check_frames(frames: int) -> None:
    """Raise TurboError unless frames = 4n + 1, which is what the VAE packs into n + 1 latent frames."""
    if frames < 1 or (frames - 1) % 4:
        nearest = max(1, 4 * round((frames - 1) / 4) + 1)
        raise TurboError(f"The number of frames must be 4n + 1 (1, 5, ... 81), got {frames}: the nearest is {nearest}.")


def latent_shape(width: int, height: int, frames: int) -> tuple[int, int, int]:
    """(latent frames, latent height, latent width) of a video; raises TurboError for a size the VAE cannot hold."""
    check_size(width, height)
    check_frames(frames)
    return (frames - 1) // 4 + 1, height // 8, width // 8


def adaptive_size(image_width: int, image_height: int, width: int, height: int) -> tuple[int, int]:
    """The (width, height) with the image's aspect ratio and about the area of width x height, in multiples of 16.

    Same rule as --adaptive_resolution of the reference's image-to-video script.
    """
    ratio = image_height / image_width
    area = width * height
    return _nearest(math.sqrt(area / ratio)), _nearest(math.sqrt(area * ratio))


def _nearest(side: float) -> int:
    return max(STRIDE, round(side / STRIDE) * STRIDE)
