"""The judge reads what was drawn, through the losses of a codec too, and nothing out of noise."""

import pytest
import torch
import torch.nn.functional as F

from turbo_core.tinywan import judge, world


@pytest.fixture(scope="module")
def truth():
    random = torch.Generator().manual_seed(5)
    scenes = world.random_scenes(160, random, held_out=None)
    return scenes, torch.cat([world.render(some, 17, 64, 64, random) for some in scenes.split(40)])


def share(scenes, videos):
    return sum(judge.score(video, scene)["all"] for scene, video in zip(scenes, videos)) / len(scenes)


def test_rendered_truth(truth):
    assert share(*truth) >= 0.99


def test_shuffled_captions_are_chance(truth):
    scenes, videos = truth
    names = list(world.ATTRIBUTES)
    rows = [judge.score(video, scene) for scene, video in zip(scenes.roll(1, 0), videos)]
    for name in names:
        chance = 1 / len(world.ATTRIBUTES[name])
        low, high = judge.interval(sum(row[name] for row in rows), len(rows))
        assert low - 0.03 <= chance <= high + 0.03, name
    assert sum(row["all"] for row in rows) <= 2


def test_noise_and_a_blurred_picture_as_a_codec_leaves(truth):
    scenes, videos = truth
    small = F.interpolate(videos[:40].flatten(0, 1), scale_factor=(1, 0.5, 0.5)[1:], mode="area")
    small = F.interpolate(small, scale_factor=2, mode="bilinear").view_as(videos[:40])
    noisy = small + 0.05 * torch.randn(small.shape, generator=torch.Generator().manual_seed(0))
    assert share(scenes[:40], noisy) >= 0.95


@pytest.mark.parametrize(
    "video",
    [
        torch.zeros(3, 9, 64, 64),  # grey, nothing in it
        torch.randn(3, 9, 64, 64, generator=torch.Generator().manual_seed(0)),
        torch.full((3, 9, 64, 64), 1.0),  # white
    ],
    ids=["empty", "noise", "white"],
)
def test_nothing_is_read_where_nothing_is(video):
    assert judge.read(video).shape == judge.NONE


def test_a_shape_that_stands_still_has_no_motion():
    random = torch.Generator().manual_seed(3)
    video = world.render(torch.tensor([[0, 1, 0, 0]]), 17, 64, 64, random)[0]
    seen = judge.read(video[:, 8:9].expand(-1, 17, -1, -1))
    assert (seen.colour, seen.shape, seen.motion) == ("red", "square", judge.NONE)


def test_a_reversed_clip_is_read_backwards():
    random = torch.Generator().manual_seed(4)
    video = world.render(torch.tensor([[2, 0, 6, 3]]), 17, 64, 64, random)[0]
    assert judge.read(video).motion == "grows" and judge.read(video.flip(1)).motion == "shrinks"


def test_the_interval_of_a_share():
    low, high = judge.interval(80, 160)
    assert low < 0.5 < high and abs((high - low) / 2 - 0.077) < 0.002
    assert judge.interval(0, 20)[0] == 0.0 and judge.interval(20, 20)[1] > 0.999
