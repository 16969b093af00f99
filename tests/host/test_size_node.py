"""TurboSize: presets, an image's own aspect ratio, and a number of frames the VAE takes."""

import pytest
import torch

from turbo_core.pipeline.sizes import PRESETS, check_frames, check_size


@pytest.fixture
def size(pack):
    return lambda *args, **kwargs: pack.nodes["TurboSize"].execute(*args, **kwargs).result


@pytest.mark.parametrize("resolution", PRESETS)
@pytest.mark.parametrize("ratio", PRESETS["480p"])
def test_every_preset_is_offered_and_given(comfy, pack, size, resolution, ratio):
    assert size(resolution, ratio, 5.0) == (*PRESETS[resolution][ratio], 81)
    offered = {entry.id: entry.options for entry in pack.nodes["TurboSize"].define_schema().inputs[:2]}
    assert resolution in offered["resolution"] and ratio in offered["aspect_ratio"]


# a photo, a phone's, a square, the limit
@pytest.mark.parametrize(("width", "height"), [(1920, 1080), (1170, 2532), (500, 500), (400, 100)])
def test_image_keeps_its_aspect_ratio_at_the_area(comfy, size, width, height):
    w, h, _ = size("480p", "16:9", 5.0, torch.zeros(1, height, width, 3))
    check_size(w, h)
    assert w / h == pytest.approx(width / height, rel=0.05)
    assert w * h == pytest.approx(832 * 480, rel=0.05)


@pytest.mark.parametrize(("seconds", "frames"), [(0, 1), (0.25, 5), (1, 17), (4.8, 77), (5, 81), (5.06, 81), (10, 161)])
def test_seconds_become_frames(comfy, size, seconds, frames):
    assert size("480p", "1:1", seconds)[2] == frames
    check_frames(frames)


def test_a_strip_is_refused_with_the_cure(comfy, size):
    with pytest.raises(ValueError, match=r"2000x16 .*crop it"):
        size("480p", "16:9", 5.0, torch.zeros(1, 16, 2000, 3))


def test_size_fits_the_hosts_latent_node(comfy, size):
    from comfy_extras.nodes_hunyuan import EmptyHunyuanLatentVideo

    width, height, length = size("480p", "9:16", 1.0)
    latent = EmptyHunyuanLatentVideo.execute(width, height, length).result[0]["samples"]
    assert latent.shape == (1, 16, 5, 104, 60)
