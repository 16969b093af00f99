"""One clip's fault is not the others': faults of input, files, memory, decoding and writing, and interrupts."""

import contextlib
import threading

import pytest
import torch

from tests.helpers.pipelines import ALL, CLIPS, SMALL, alone, i2v, same, t2v
from turbo_core.errors import TurboError
from turbo_core.pipeline import Clip, Pipeline, experts, residence, resident, sampling
from turbo_core.pipeline.residence import Stay
from turbo_core.wan import WanModel


def test_a_file_replaced_while_it_is_in_use_is_an_error(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(resident, "what_stays", lambda *_: Stay())
    dit = tmp_path / "dit.pth"
    dit.write_bytes((tiny / "TinyWan2.1-T2V.pth").read_bytes())
    with Pipeline(dit, tiny / "TinyWan2.1_VAE.pth", tiny / "tiny_umt5.safetensors", device="cpu") as pipe:
        pipe("a", steps=1, **SMALL)
        dit.write_bytes((tiny / "TinyWan2.1-T2V-quant.pth").read_bytes())
        with pytest.raises(TurboError, match="has changed since"):
            pipe("a", steps=1, **SMALL)


def test_another_file_of_the_same_form_in_the_place_of_a_model_is_an_error(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(resident, "what_stays", lambda *_: Stay())
    dit = tmp_path / "dit.pth"
    raw = bytearray((tiny / "TinyWan2.1-T2V.pth").read_bytes())
    dit.write_bytes(raw)
    with Pipeline(dit, tiny / "TinyWan2.1_VAE.pth", tiny / "tiny_umt5.safetensors", device="cpu") as pipe:
        pipe("a", steps=1, **SMALL)
        (tmp_path / "new.pth").write_bytes(raw)
        (tmp_path / "new.pth").replace(dit)
        with pytest.raises(TurboError, match="has changed since"):
            pipe("a", steps=1, **SMALL)


def test_where_memory_ran_out_no_model_stays(tiny, monkeypatch):
    monkeypatch.setattr(resident, "what_stays", lambda *_: Stay(True, True))
    step, failures = WanModel.forward, []

    def full(self, *arguments, **settings):
        if not failures and len(pipe.experts.models) == 2:
            raise RuntimeError("Triton Error [CUDA]: out of memory")
        return step(self, *arguments, **settings)

    def failed(clip, error):
        failures.append((str(error), dict(pipe.experts.models)))

    monkeypatch.setattr(WanModel, "forward", full)
    clips = [Clip("a", seed, tiny / "image.png", steps=3, **SMALL) for seed in range(2)]
    with i2v(tiny) as pipe:
        assert len(list(pipe.map(clips, failed=failed))) == 1
    [(said, models)] = failures
    assert "Out of memory" in said and models == {}


def test_a_clip_that_fails_leaves_the_others_alone(tiny):
    bad = [
        Clip("a \udcff circle", **SMALL),
        Clip("x", size=(33, 32)),
        Clip("x", image="none.png", **SMALL),
        Clip("x", steps=101, **SMALL),
        Clip("x", seed=-1, **SMALL),
    ]
    mixed, failures, written = [bad[0], CLIPS[0], *bad[1:], CLIPS[1]], [], []
    with t2v(tiny, memory=ALL) as pipe:
        made = list(pipe.map(mixed, lambda clip, _: written.append(clip), lambda *failure: failures.append(failure)))
        assert [clip for clip, _ in failures] == bad
        assert all(isinstance(error, TurboError) for _, error in failures)
        assert written == CLIPS[:2]
        assert all(same(one, alone(t2v(tiny), clip)) for one, clip in zip(made, CLIPS))
        with pytest.raises(TurboError, match="nearest is 32x32"):
            list(pipe.map([CLIPS[0], bad[1]]))


def test_a_failure_of_decoding_or_writing_is_the_clips_own(tiny, monkeypatch):
    decode, failures = sampling.decode_each, []

    def spoiled(vae, latents, keep, tiled, *more):
        return decode(vae, latents * (float("nan") if tiled else 1), keep, tiled, *more)

    def write(clip, result):
        if clip.seed == 4:
            raise TurboError("the disk is full")

    monkeypatch.setattr(sampling, "decode_each", spoiled)
    clips = [Clip("a", 3, tiled=True, **SMALL), *CLIPS[1:]]
    with t2v(tiny, memory=ALL) as pipe:
        made = list(pipe.map(clips, write, lambda clip, error: failures.append((clip.seed, str(error)))))
    assert len(made) == 1 and made[0].settings["seed"] == 5
    assert [seed for seed, _ in failures] == [3, 4] and "VAE: the latents hold NaN" in failures[0][1]


def test_memory_that_runs_out_fails_one_clip_and_keeps_nothing_after_it(tiny, monkeypatch, caplog):
    sampled, failures = resident.Trajectory.advance, []

    def full(self, *arguments, **settings):
        if self.ode:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return sampled(self, *arguments, **settings)

    monkeypatch.setattr(resident.Trajectory, "advance", full)
    with t2v(tiny, memory=ALL) as pipe:
        made = list(pipe.map(CLIPS, failed=lambda clip, error: failures.append((clip, str(error)))))
        assert pipe.memory == 0 and not pipe.experts.models
    assert failures[0][0] is CLIPS[1] and "Out of memory (CUDA out of memory" in failures[0][1]
    assert len(made) == 2 and "no model stays" in caplog.text


def test_more_than_the_machine_has_is_told_and_not_tried(tiny, monkeypatch):
    """Linux gives memory that is not there, and kills a process when it is used."""
    with t2v(tiny) as pipe, pytest.raises(TurboError, match=r"99984x99984 with 81 frames: a step takes .* TB"):
        pipe("a", size=(99984, 99984), frames=81)
    ready = pipe.check(Clip("a", **SMALL))
    need = int(residence._step_bytes(pipe.model, ready, torch.float32))
    for total, fits in ((need + 1, True), (need - 1, False)):
        monkeypatch.setattr(residence, "available_memory", lambda total=total: (0, total))
        with contextlib.nullcontext() if fits else pytest.raises(TurboError, match="smaller --size"):
            pipe.check(Clip("a", **SMALL))
    residence.check_room(pipe.model, ready, torch.float32, torch.device("cuda"))  # a card says so itself


def test_an_interrupt_ends_the_thread_too(tiny):
    def progress(stage, done, total):
        if stage == "sampling" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), t2v(tiny, memory=ALL, progress=progress) as pipe:
        list(pipe.map(CLIPS))
    assert not any(thread.name.startswith("decode") for thread in threading.enumerate())


def test_after_an_interrupt_no_mixture_of_the_experts_is_left(tiny, monkeypatch):
    """In the last high-noise step blocks are overwritten one by one; who interrupts may use the pipeline again."""
    clip, stopped = Clip("a", 7, tiny / "image.png", steps=4, **SMALL), []
    expected = alone(i2v(tiny), clip)
    monkeypatch.setattr(resident, "what_stays", lambda *_: Stay(dit=True))
    opened = experts.opened

    def progress(stage, done, total):
        if stage == "sampling" and pipe.experts.handover is not None and not stopped:
            stopped.append(done)
            raise KeyboardInterrupt

    with i2v(tiny, progress=progress) as pipe:
        monkeypatch.setattr(experts, "opened", lambda path: opened(path, writable=True))
        pipe.experts.files, pipe.experts.in_place = {}, True
        with pytest.raises(KeyboardInterrupt):
            list(pipe.map([clip]))
        [made] = pipe.map([clip])
    assert stopped == [2] and same(made, expected)


def test_a_fault_of_decoding_leaves_the_experts_to_the_clip_that_is_sampled(tiny, monkeypatch):
    """Decoding has a thread of its own: what it freed would be gone in the middle of another clip's step."""
    clips = [Clip("a", seed, tiny / "image.png", steps=3, **SMALL) for seed in range(3)]
    expected = [alone(i2v(tiny), clip) for clip in clips]
    monkeypatch.setattr(resident, "what_stays", lambda *_: Stay(dit=True, overlap=True))
    freed, failures, decode = [], [], resident.decode_frames

    def spoiled(*arguments):
        if not failures:
            raise TurboError("no picture")
        return decode(*arguments)

    monkeypatch.setattr(resident, "decode_frames", spoiled)
    with i2v(tiny) as pipe:
        pipe.experts.in_place = True
        free = pipe.experts.free
        monkeypatch.setattr(pipe.experts, "free", lambda: (freed.append(threading.current_thread().name), free()))
        made = list(pipe.map(clips, failed=lambda *failure: failures.append(failure)))
        assert not [name for name in freed if name.startswith("decode")]
    assert len(failures) == 1 and all(same(one, other) for one, other in zip(made, expected[1:], strict=True))
