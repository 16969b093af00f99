"""The clips have the truth they claim, the same one for a seed, and captions that say it."""

import torch

from turbo_core.tinywan import world


def scenes(count=12, seed=0, held_out=False):
    return world.random_scenes(count, torch.Generator().manual_seed(seed), held_out)


def drawn(some, frames=9, height=48, width=64, seed=1):
    return world.render(some, frames, height, width, torch.Generator().manual_seed(seed))


def test_a_seed_is_a_data_set():
    assert torch.equal(drawn(scenes()), drawn(scenes()))
    assert not torch.equal(drawn(scenes()), drawn(scenes(), seed=2))


def test_values_fill_the_range_of_a_video():
    video = drawn(scenes())
    assert video.shape == (12, 3, 9, 48, 64) and video.dtype == torch.float32
    assert video.min() >= -1 and video.max() <= 1 and video.std() > 0.1


def test_scenes_of_one_motion_are_any_other_ways():
    found = world.random_scenes(60, torch.Generator().manual_seed(1), motion="orbits")
    assert {world.describe(scene)["motion"] for scene in found} == {"orbits"}
    assert not any(map(world.is_held_out, found)) and len(found[:, 0].unique()) == len(world.COLOURS)


def test_held_out_combinations_never_come_among_training_scenes():
    assert not any(map(world.is_held_out, scenes(200)))
    held = scenes(20, held_out=True)
    assert all(map(world.is_held_out, held))
    # no colour, shape or motion is missing from training because of it
    for column, values in zip(scenes(600).unbind(1), world.ATTRIBUTES.values()):
        assert len(column.unique()) == len(values)


def test_a_caption_names_what_is_there():
    for seed, scene in enumerate(scenes(40)):
        text, words = world.caption(scene, seed), world.describe(scene)
        assert words["colour"] in text and words["background"] in text and not world.is_outside(text)
        assert text == world.caption(scene, seed)
        assert world.words_of(text) <= world.vocabulary()


def test_videos_far_larger_or_longer_than_any_it_learnt_from_are_told():
    assert world.told_of_size(192, 192, 33) is world.told_of_size(256, 256, 33) is world.told_of_size(96, 96, 5) is None
    for video in ((832, 480, 33), (192, 192, 81)):
        assert "--size 192x192 --frames 33" in world.told_of_size(*video)


def test_prompts_of_another_world_are_recognized():
    assert world.is_outside("two stylish cats box on a stage")
    assert world.is_outside("a red circle")  # no motion, no background
    assert world.is_outside("A red cat sleeps on the black sofa.")  # articles and prepositions name nothing
    assert world.is_outside("A woman with a white dress walks to the navy car")
    assert not world.is_outside("A red circle moves left on a grey background")


def test_edges_are_soft():
    alpha = world.coverage(
        torch.tensor([0]), torch.full((1, 1), 16.3), torch.full((1, 1), 16.0), torch.full((1, 1), 8.0), 32, 32
    )
    between = ((alpha > 0.05) & (alpha < 0.95)).sum()
    assert between > 20
    assert abs(alpha.sum().item() - 64 * torch.pi) < 2  # the area of the disc
