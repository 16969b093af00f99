"""The next expert takes the place of the present one, block by block, and computes as if it had been loaded alone."""

import threading
import time
import weakref

import pytest
import torch

from tests.helpers.states import saved
from turbo_core import checkpoint, pipeline
from turbo_core.errors import TurboError
from turbo_core.int8 import quantize_block
from turbo_core.pipeline import experts
from turbo_core.pipeline.handover import CardLane, Handover, can_follow
from turbo_core.schedule import rcm_sigmas
from turbo_core.wan import QUANTIZED_LINEARS, WanModel

INPUT = torch.randn(1, 16, 1, 4, 4), torch.tensor([900.0]), torch.randn(1, 3, 32)


def expert(seed, quantized=False):
    torch.manual_seed(seed)
    sd = WanModel(128, 256, 1, 3, text_dim=32, freq_dim=32, sla=True).state_dict()
    if quantized:
        for name in [
            n for n in sd if n.startswith("blocks.") and n.endswith(tuple(f".{x}.weight" for x in QUANTIZED_LINEARS))
        ]:
            sd[name], sd[f"{name}_scale"] = quantize_block(sd[name])
    return sd


def model_of(sd, dtype=None):
    return WanModel.from_state_dict({name: t.clone() for name, t in sd.items()}, dtype)


@pytest.mark.parametrize("quantized", [False, True])
def test_the_present_expert_finishes_and_the_next_one_follows(quantized):
    high, low = expert(0, quantized), expert(1, quantized)
    model, expected = model_of(high), [model_of(sd)(*INPUT, topk=0.5) for sd in (high, low)]
    handover = Handover(model, low)
    assert torch.equal(model(*INPUT, topk=0.5), expected[0])
    assert torch.equal(model(*INPUT, topk=0.5), expected[1])
    assert not handover._hooks and not handover._thread.is_alive()
    assert torch.equal(model(*INPUT, topk=0.5), expected[1])
    assert all(torch.equal(t, low[name]) for name, t in model.state_dict().items())


def test_weights_arrive_in_the_models_own_types():
    low = expert(1)
    model, expected = model_of(expert(0), torch.bfloat16), model_of(low, torch.bfloat16)(*INPUT)
    Handover(model, low)
    model(*INPUT)
    assert torch.equal(model(*INPUT), expected)


def test_a_block_is_left_alone_until_its_last_use_is_over(monkeypatch):
    """While block 1 computes, block 0 may be overwritten and block 2 may not."""
    high, low = expert(0), expert(1)
    model = model_of(high)
    overwritten = threading.Event()
    Handover(model, low)

    def during(module, args):
        deadline = time.monotonic() + 30
        while not torch.equal(model.blocks[0].ffn[0].weight, low["blocks.0.ffn.0.weight"]):
            assert time.monotonic() < deadline, "block 0 was not replaced behind block 1"
            time.sleep(0.001)
        overwritten.set()
        assert torch.equal(model.blocks[2].ffn[0].weight, high["blocks.2.ffn.0.weight"])
        assert torch.equal(model.head.head.weight, high["head.head.weight"])

    hook = model.blocks[1].register_forward_pre_hook(during)
    model(*INPUT)
    hook.remove()
    assert overwritten.is_set()


def test_only_files_with_the_same_tensors_can_follow():
    model = model_of(expert(0))
    assert can_follow(model, expert(1))
    assert not can_follow(model, expert(1, quantized=True))
    smaller = {name: t for name, t in expert(1).items() if not name.startswith("blocks.2.")}
    assert not can_follow(model, smaller)


@pytest.mark.parametrize(
    "fault, said",
    [(OSError("input/output error"), "input/output error.*still there"), (MemoryError("none left"), "none left")],
)
def test_a_fault_of_any_kind_in_the_copying_thread_is_told_and_no_forward_waits(fault, said, monkeypatch):
    model = model_of(expert(0))
    handover = Handover(model, expert(1))

    def broken(pairs, ticket):
        raise fault

    monkeypatch.setattr(handover._lane, "copy", broken)
    model(*INPUT)
    with pytest.raises(TurboError, match=said):
        model(*INPUT)
    handover.cancel()
    assert not handover._thread.is_alive()


def test_cancel_before_and_after_the_end():
    model = model_of(expert(0))
    handover = Handover(model, expert(1))
    handover.cancel()
    handover.cancel()
    assert torch.equal(model(*INPUT), model_of(expert(0))(*INPUT))


class FakeEvent:
    """A card's event and stream, with a diary of what waits for what."""

    def __init__(self, diary):
        self.diary = diary

    def record(self, stream):
        self.diary.append(("record", self, stream))

    def synchronize(self):
        self.diary.append(("synchronize", self))


def test_on_a_card_a_copy_waits_for_the_compute_and_a_buffer_for_its_copy(monkeypatch):
    """The order of events, which no CPU can show by results; two buffers take turns."""
    diary = []

    class Stream(FakeEvent):
        def __init__(self, device=None):
            super().__init__(diary)

        def wait_event(self, event):
            self.diary.append(("wait", self, event))

    compute = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda: FakeEvent(diary))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: torch.no_grad())
    groups = [
        [(torch.zeros(7, dtype=torch.bfloat16), torch.randn(7)), (torch.zeros(3), torch.randn(3))] for _ in range(3)
    ]
    lane = CardLane(torch.device("cuda", 0), groups)
    for pairs in groups:
        diary.clear()
        ticket = lane.ticket()
        buffer, free = lane.buffers[0]
        lane.copy(pairs, ticket)
        lane.wait(ticket)
        assert diary == [
            ("record", ticket[0], compute),
            ("synchronize", free),
            ("wait", lane.stream, ticket[0]),
            ("record", free, lane.stream),
            ("record", ticket[1], lane.stream),
            ("wait", compute, ticket[1]),
        ]
        assert lane.buffers[1][0] is buffer
        for own, following in pairs:
            assert torch.equal(own, following.to(own.dtype))


@pytest.mark.parametrize("steps", [4, 3])
def test_the_pipeline_hands_over_in_place_and_gets_the_same_video(tmp_path, steps, monkeypatch):
    files = [saved(expert(seed), tmp_path / f"{seed}.safetensors") for seed in (0, 1)]
    reads, weights = [], experts.weights
    monkeypatch.setattr(
        experts, "weights", lambda file, **how: reads.append(file.description.path) or weights(file, **how)
    )
    results, sigmas = [], rcm_sigmas(steps, 80)
    last_high = min(sigma for sigma in sigmas.tolist() if sigma >= 0.9)
    for in_place in (False, True):
        reads.clear()
        opened = [checkpoint.opened(path) for path in files]
        pair = experts.Experts(opened, torch.device("cpu"), torch.float32)
        dropped = [weakref.ref(file.tensors["head.head.weight"]) for file in opened]
        del opened
        pair.in_place = in_place
        made = []

        def seen(sigma, pair=pair, made=made):
            made.append(pair.at(int(sigma < 0.9), _no_stage, leaves=sigma == last_high))
            return made[-1]

        results.append(pipeline.sample(seen, INPUT[2], (1, 16, 1, 4, 4), sigmas, seed=3))
        assert reads == list(map(str, files))
        assert len({id(model) for model in made}) == (1 if in_place else 2)
        pair.free()
        made.clear()
        assert not any(reference() is not None for reference in dropped)  # neither file stays mapped
    assert torch.equal(*results)


def _no_stage(name):
    return torch.no_grad()
