"""Sizes: presets, the nearest valid size in every message, and the reference's adaptive rule."""

import pytest

from turbo_core.errors import TurboError
from turbo_core.pipeline.sizes import PRESETS, adaptive_size, check_frames, check_size, latent_shape, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("832x480", (832, 480)), ("480P", (832, 480)), ("720p-9:16", (720, 1280)), ("64 × 16", (64, 16))],
)
def test_size_texts(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "cure"),
    [("830x485", "832x480"), ("1280x725", "1280x720"), ("0x480", "16x480"), ("480", "832x480"), ("480p-2:1", "480p-1")],
)
def test_a_bad_size_names_the_nearest(text, cure):
    with pytest.raises(TurboError, match=cure):
        parse_size(text)


def test_every_preset_is_valid():
    for ratios in PRESETS.values():
        for size in ratios.values():
            check_size(*size)


@pytest.mark.parametrize(("frames", "nearest"), [(80, 81), (82, 81), (0, 1), (-7, 1), (12, 13)])
def test_bad_frames_name_the_nearest(frames, nearest):
    with pytest.raises(TurboError, match=f"nearest is {nearest}\\."):
        check_frames(frames)


def test_latent_shape_of_the_published_sizes():
    assert latent_shape(832, 480, 81) == (21, 60, 104)
    assert latent_shape(1280, 720, 81) == (21, 90, 160)
    assert latent_shape(16, 16, 1) == (1, 2, 2)


@pytest.mark.parametrize(
    ("image", "size"),
    # sqrt(area / ratio) and sqrt(area * ratio) of the 1280x720 area, in multiples of 16; the last one is extreme
    [((1920, 1080), (1280, 720)), ((1000, 1000), (960, 960)), ((3000, 4000), (832, 1104)), ((10000, 1), (96000, 16))],
)
def test_adaptive_size_keeps_area_and_aspect(image, size):
    assert adaptive_size(*image, 1280, 720) == size
