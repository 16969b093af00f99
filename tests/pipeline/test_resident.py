"""Models that stay: the same videos as one at a time, each file read once, what stays where."""

import threading
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.helpers.opens import counted_opens
from tests.helpers.pipelines import ALL, CLIPS, SMALL, alone, i2v, same, t2v
from tests.helpers.tiny_decoders import tiny_decoder
from turbo_core import checkpoint
from turbo_core.parallel import Alone
from turbo_core.pipeline import Clip, Pipeline, embeddings, experts, residence, resident, sampling
from turbo_core.pipeline.residence import Stay
from turbo_core.vae import MOST_FRAMES, load_fast


@pytest.mark.parametrize("memory", [ALL, 0])
def test_drafts_are_the_same_latents_decoded_by_the_fast_decoder(tiny, tmp_path, memory, monkeypatch):
    """For text the VAE is not read; for pictures it encodes them."""
    fast = tmp_path / "taew2_1.safetensors"
    save_file(tiny_decoder(), fast)
    picture = replace(CLIPS[0], prompt="a", image=tiny / "image.png", steps=3)
    opened, _ = counted_opens(monkeypatch)
    for make, clip, reads_vae in ((t2v, CLIPS[0], 0), (i2v, picture, 1)):
        with make(tiny) as pipe:
            [expected] = pipe.map([clip])
        opened.clear()
        with make(tiny, memory=memory, vae_fast=fast) as pipe:
            [made] = pipe.map([clip])
        assert opened["TinyWan2.1_VAE.pth"] == reads_vae and opened[fast.name] == 1
        assert torch.equal(made.latents, expected.latents) and made.frames.shape == expected.frames.shape
        assert torch.equal(made.frames, sampling.decode_frames(load_fast(fast), made.latents))
        assert (made.settings["decoder"], expected.settings["decoder"]) == ("TAEHV", None)


@pytest.mark.parametrize("memory", [ALL, 0])
def test_a_set_is_the_single_videos_bit_for_bit(tiny, memory):
    with t2v(tiny, memory=memory) as pipe:
        made = list(pipe.map(CLIPS))
    assert all(same(one, alone(t2v(tiny), clip)) for one, clip in zip(made, CLIPS, strict=True))


@pytest.mark.parametrize(
    "stay", [Stay(True, True, True), Stay(True, True, False), Stay(False, True, True), Stay(False, False, False)]
)
def test_two_experts_in_any_room_give_the_same_videos(tiny, tmp_path, stay, monkeypatch):
    Image.new("RGB", (32, 32), "green").save(tmp_path / "green.png")
    pictures = tiny / "image.png", tmp_path / "green.png", tiny / "image.png"
    clips = [
        Clip("a", seed, picture, steps=steps, **SMALL)
        for (seed, steps), picture in zip([(1, 4), (2, 2), (3, 3)], pictures)
    ]
    expected = [alone(i2v(tiny), clip) for clip in clips]
    monkeypatch.setattr(resident, "what_stays", lambda *_: stay)
    with i2v(tiny) as pipe:
        assert all(same(one, other) for one, other in zip(pipe.map(clips), expected, strict=True))


def test_experts_that_follow_in_place_serve_a_group_with_one_reading_each(tiny, monkeypatch):
    """On a card the low-noise expert comes behind the last step of the last clip, not of the first."""
    clips = [Clip("a", seed, tiny / "image.png", steps=4, **SMALL) for seed in range(3)]
    expected = [alone(i2v(tiny), clip) for clip in clips]
    monkeypatch.setattr(resident, "what_stays", lambda *_: Stay(dit=True))
    reads, weights = [], experts.weights
    monkeypatch.setattr(
        experts, "weights", lambda file, **how: reads.append(file.description.path[-14:]) or weights(file, **how)
    )
    for _ in range(2):
        with i2v(tiny) as pipe:
            pipe.experts.in_place = True
            assert all(same(one, other) for one, other in zip(pipe.map(clips), expected, strict=True))
    assert reads == ["high-quant.pth", "-low-quant.pth"] * 2


def test_each_file_is_read_once_for_a_whole_set(tiny, monkeypatch):
    opened, _ = counted_opens(monkeypatch)
    with i2v(tiny, memory=ALL) as pipe:
        for _ in range(2):
            assert len(list(pipe.map([Clip(p, 0, tiny / "image.png", **SMALL) for p in ("a", "b", "a")]))) == 3
    assert set(opened.values()) == {1} and len(opened) == 4


def test_the_next_clip_is_sampled_while_one_is_decoded(tiny, monkeypatch):
    """The first decoding ends only when the second clip has begun: without overlap this would wait forever."""
    begun, decode = threading.Semaphore(0), resident.decode_frames
    sampled = resident.Trajectory.advance

    def advance(*arguments, **settings):
        begun.release()
        return sampled(*arguments, **settings)

    def waiting(*arguments):
        first.append(threading.current_thread() is threading.main_thread())
        if len(first) == 1:
            assert begun.acquire(timeout=60) and begun.acquire(timeout=60)
        return decode(*arguments)

    first = []
    monkeypatch.setattr(resident.Trajectory, "advance", advance)
    monkeypatch.setattr(resident, "decode_frames", waiting)
    with t2v(tiny, memory=ALL) as pipe:
        assert len(list(pipe.map(CLIPS[:1] * 2))) == 2
    assert first == [False, False]


def test_what_stays_follows_from_memory(tiny):
    with i2v(tiny, memory=ALL) as pipe:
        ready = pipe.check(Clip("a", image=tiny / "image.png", **SMALL))
        one, both = max(pipe.experts.bytes), sum(pipe.experts.bytes)
        work = residence.what_stays(pipe.model, ready, [0, 0], 0, torch.float32)
        assert work == Stay()
        seen = {
            residence.what_stays(pipe.model, ready, pipe.experts.bytes, memory, torch.float32)
            for memory in range(0, 4 * both + 40_000_000, max(1, one // 50))
        }
    rooms = {Stay(False, False, False), Stay(False, True, False), Stay(True, True, False), Stay(True, True, True)}
    assert {Stay(False, False, False), Stay(True, True, True)} <= seen <= rooms | {Stay(False, True, True)}
    assert [Stay(dit=True).together(two) for two in (True, False)] == [residence.GROUP, 1]
    assert Stay(True, True).together(True) == 1 and Stay().together(False) == residence.GROUP


def test_a_second_group_begins_with_the_high_noise_expert_again(tiny, monkeypatch):
    """After a hand-over the module in memory is the low-noise expert, whatever clip asks next."""
    clips = [Clip("a", seed, tiny / "image.png", steps=3, **SMALL) for seed in range(2)]
    expected = [alone(i2v(tiny), clip) for clip in clips]
    monkeypatch.setattr(resident, "what_stays", lambda *_: Stay(dit=True))
    with i2v(tiny) as pipe:
        pipe.experts.files, pipe.experts.in_place = {}, True
        made = [result for clip in clips for result in pipe.map([clip])]
    assert all(same(one, other) for one, other in zip(made, expected, strict=True))


def test_experts_that_stay_for_small_clips_do_not_stand_in_for_each_other_after_a_large_one(tiny, monkeypatch):
    """A hand-over overwrites the high-noise expert: the low-noise one that a smaller clip left must be gone by then."""
    clips = [Clip("a", seed, tiny / "image.png", steps=3, **SMALL) for seed in range(3)]
    expected = [alone(i2v(tiny), clip) for clip in clips]
    rooms = [Stay(True, True), Stay(dit=True), Stay(True, True)]
    monkeypatch.setattr(resident, "what_stays", lambda model, ready, *_: rooms[ready.clip.seed])
    with i2v(tiny) as pipe:
        pipe.experts.files, pipe.experts.in_place = {}, True
        made = list(pipe.map(clips))
    assert all(same(one, other) for one, other in zip(made, expected, strict=True))


def test_clips_that_wait_for_the_low_noise_expert_keep_no_keys_of_their_text(tiny, monkeypatch):
    clips = [Clip("a", seed, tiny / "image.png", steps=3, **SMALL) for seed in range(3)]
    monkeypatch.setattr(resident, "what_stays", lambda *_: Stay(dit=True))
    kept, advance = [], resident.Trajectory.advance

    def advanced(self, model_at, until, *rest):
        if until == clips[0].steps:
            kept.append(self.text._kept)
        return advance(self, model_at, until, *rest)

    monkeypatch.setattr(resident.Trajectory, "advance", advanced)
    with i2v(tiny) as pipe:
        assert len(list(pipe.map(clips))) == 3
    assert kept == [None] * 3


def test_results_keep_the_order_of_the_clips_whatever_room_each_has(tiny, monkeypatch):
    """A clip with no room for decoding beside it waits for the one before, which is first in order and in memory."""
    clips = [Clip("a", seed, steps=1, **SMALL) for seed in range(5)]
    rooms = [Stay(True, True, True), Stay(), Stay(True, True, True), Stay(True, True), Stay(True, True, True)]
    monkeypatch.setattr(resident, "what_stays", lambda model, ready, *_: rooms[ready.clip.seed])
    decode, advance, decoding, beside = resident.decode_frames, resident.Trajectory.advance, threading.Event(), []

    def slow(*arguments):
        decoding.set()
        threading.Event().wait(0.2)
        try:
            return decode(*arguments)
        finally:
            decoding.clear()

    def sampled(self, *arguments):
        beside.append(decoding.is_set())
        return advance(self, *arguments)

    monkeypatch.setattr(resident, "decode_frames", slow)
    monkeypatch.setattr(resident.Trajectory, "advance", sampled)
    with t2v(tiny, memory=ALL) as pipe:
        assert [result.settings["seed"] for result in pipe.map(clips)] == [0, 1, 2, 3, 4]
    assert not beside[1] and not beside[3]


@pytest.mark.parametrize("overlap", [True, False])
def test_beside_sampling_a_card_decodes_as_little_at_a_time_as_was_counted(tiny, overlap, monkeypatch):
    """Of the memory that is free when decoding begins, a step may want most in a moment."""
    told, taken, decode = [], [], resident.decode_frames
    monkeypatch.setattr(resident, "decode_frames", lambda *given: told.append(given[-1]) or decode(*given))
    monkeypatch.setattr(resident, "what_stays", lambda *_: Stay(True, True, overlap))
    with t2v(tiny) as pipe:
        list(pipe.map(CLIPS[:2]))
    assert told == [overlap] * 2
    monkeypatch.setattr(sampling, "decode_each", lambda *given: taken.append(given[-1]) or [torch.zeros(1)])
    for device in ("cpu", "meta"):
        decode(None, torch.zeros(1, 16, 2, 4, 4, device=device), False, None, None, overlap)
    assert taken == ([MOST_FRAMES, 1] if overlap else [MOST_FRAMES] * 2)


def test_a_clip_that_is_done_leaves_neither_picture_nor_latents_behind(tiny, monkeypatch):
    """A window of 256 clips lives as long as its last one: with photographs that would be gigabytes."""
    works, seen, make = [], [], resident.Work

    def kept(*arguments):
        works.append(make(*arguments))
        return works[-1]

    monkeypatch.setattr(resident, "Work", kept)
    clips = [Clip("a", seed, tiny / "image.png", steps=1, **SMALL) for seed in range(4)]
    with i2v(tiny, memory=ALL) as pipe:
        for clip, _ in zip(clips, pipe.map(clips), strict=True):
            work = works[clip.seed]
            seen.append((work.ready, work.embedding, work.trajectory, work.latents))
    assert seen == [(None,) * 4] * 4


@pytest.mark.parametrize("fits", [True, False])
def test_the_encoder_comes_back_only_where_it_fits_beside_the_models(tiny, fits, monkeypatch):
    """A second window, or a second call, reads it while the diffusion model is there."""
    there, load = [], embeddings.load_text_encoder
    monkeypatch.setattr(resident, "what_stays", lambda *_: Stay(True, True))
    with t2v(tiny) as pipe:
        pipe("a", steps=1, **SMALL)
        pipe.embeddings.free()
        size = pipe.embeddings._size() + pipe.coders.bytes() + sum(pipe.experts.bytes)
        pipe.memory = size if fits else size - 1

        def loading(path, tokenizer, device, *more):
            if device != "meta":
                there.append(len(pipe.experts.models))
            return load(path, tokenizer, device, *more)

        monkeypatch.setattr(embeddings, "load_text_encoder", loading)
        second = pipe("b", steps=1, **SMALL)
    assert there == [int(fits)]
    assert same(second, alone(t2v(tiny), Clip("b", steps=1, **SMALL)))


def test_the_processes_of_a_team_compare_the_files_of_a_folder(tiny, tmp_path):
    """A model may be a folder of shards, which is no file to read from."""

    class Asked(Alone):
        def agree(self, facts):
            told.update(facts())

    told = {}
    state = {name: t.contiguous() for name, t in checkpoint.load(tiny / "TinyWan2.1-T2V.pth")[0].items()}
    save_file(state, tmp_path / "model.safetensors")
    vae = tiny / "TinyWan2.1_VAE.pth"
    Pipeline(tmp_path, vae, tiny / "tiny_umt5.safetensors", device="cpu", team=Asked())
    # each of them decodes some rows of a video: two VAEs would leave a seam
    assert f"the file {tmp_path / 'model.safetensors'}" in told and "bytes, " in told[f"the file {vae}"]
    Pipeline(tmp_path, tmp_path / "gone.pth", tiny / "tiny_umt5.safetensors", device="cpu", team=Asked())
    assert told[f"the file {tmp_path / 'gone.pth'}"] == "no such file"  # loading it names the cure


def test_experts_that_come_again_wait_in_locked_memory(tiny, monkeypatch):
    """Copies stand in for page-locked memory, from which a card takes copies. The second reading locks, the third is
    none."""

    class Locked(dict):
        def items(self):
            return [(name, tensor.clone()) for name, tensor in super().items()]

    clips = [Clip("a", seed, tiny / "image.png", steps=3, **SMALL) for seed in range(4)]
    expected = [alone(i2v(tiny), clip) for clip in clips]
    monkeypatch.setattr(resident, "what_stays", lambda *_: Stay(dit=True))
    monkeypatch.setattr(experts, "page_locked", lambda state, read: Locked((n, read(t)) for n, t in state.items()))
    reads, weights = [], experts.weights
    monkeypatch.setattr(
        experts, "weights", lambda file, **how: reads.append(file.description.path[-14:]) or weights(file, **how)
    )
    for in_place in (True, False):
        reads.clear()
        with i2v(tiny) as pipe:
            pipe.experts.files, pipe.experts.in_place, pipe.experts.waits = {}, in_place, True
            made = [result for clip in clips for result in pipe.map([clip])]
            assert sorted(pipe.experts.waiting) == [0, 1]
        assert not pipe.experts.waiting
        assert all(same(one, other) for one, other in zip(made, expected, strict=True))
        assert sorted(reads) == ["-low-quant.pth"] * 2 + ["high-quant.pth"] * 2


def test_where_the_system_locks_no_more_they_come_from_their_files(tiny, monkeypatch):
    monkeypatch.setattr(resident, "what_stays", lambda *_: Stay(dit=True))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: (_ for _ in ()).throw(RuntimeError("no more")))
    with i2v(tiny) as pipe:
        pipe.experts.waits = True
        for seed in range(3):
            pipe("a", seed=seed, image=tiny / "image.png", steps=3, **SMALL)
        assert not pipe.experts.waiting and not pipe.experts.waits


def test_processes_that_share_a_device_divide_its_memory(tiny, monkeypatch):
    waiting, make = [], resident.Experts
    monkeypatch.setattr(resident, "free_memory", lambda device: 1000)
    monkeypatch.setattr(resident, "waiting_memory", lambda device: 600)
    monkeypatch.setattr(resident, "Experts", lambda *given: waiting.append(given[-1]) or make(*given))
    left = []
    for settings in ({}, {"sharing": (4, 6)}, {"sharing": (4, 4), "memory": 7}, {"memory": 0}):
        with i2v(tiny, **settings) as pipe:
            left.append(pipe.memory)
    assert left == [1000, 250, 7, 0]
    assert waiting == [600, 100, 150, 0], "generate, with no memory, reads each file once"
