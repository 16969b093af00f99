"""The hand-over between two experts on a card with little memory, and that nothing keeps them afterwards."""

import gc
import weakref

import pytest
import torch

FILES = "TinyWan2.2-I2V-high-quant.pth", "TinyWan2.2-I2V-low-quant.pth"


class Card:
    """A card of `capacity` bytes to the host's bookkeeping: its weights are on "cpu:0", which is not "cpu" to it."""

    device = torch.device("cpu", 0)

    def __init__(self, management, capacity):
        self.management, self.capacity, self.seen = management, capacity, []

    def loaded(self):
        models = [loaded.model for loaded in self.management.current_loaded_models]
        return {id(m.model): m.loaded_size() for m in models if m is not None and m.load_device == self.device}

    def free(self, device=None, torch_free_too=False):
        free = self.capacity - sum(self.loaded().values())
        return (free, 0) if torch_free_too else free


@pytest.fixture
def card(comfy, lab, monkeypatch):
    """Makes a Card that the host takes for the device it computes on."""
    management = comfy.model_management

    def make(capacity):
        pretended = Card(management, capacity)
        monkeypatch.setattr(management, "current_loaded_models", [])
        monkeypatch.setattr(management, "get_torch_device", lambda: Card.device)
        monkeypatch.setattr(management, "get_free_memory", pretended.free)
        monkeypatch.setattr(management, "minimum_inference_memory", lambda: 0)
        monkeypatch.setattr(management, "extra_reserved_memory", lambda: 0)
        # what activations take is not the point here, and more than these models
        monkeypatch.setattr(comfy.sampler_helpers, "estimate_memory", lambda *_: (0, 0))
        return pretended

    yield make
    for model in management.current_loaded_models:
        model.model_unload()


def _positive(lab, seed=7):
    mask = torch.ones(1, 1, *lab.shape[2:])
    return lab.positive(seed, concat_latent_image=lab.draw(*lab.shape, seed=5), concat_mask=mask)


def _size(lab):
    return lab.load(FILES[0]).model_size()


def _watched(lab, model, look):
    """A clone that calls look() in the first block of each evaluation."""

    def see(args):
        if args["block_index"] == 0:
            look()
        return args

    model = model.clone()
    model.set_model_double_block_patch(see)
    return model


@pytest.mark.parametrize(("room", "both_stay"), [(1.5, False), (3.0, True)])
def test_with_room_for_one_expert_only_one_is_loaded(lab, card, room, both_stay):
    expected = lab.turbo(lab.load(FILES[0]), model_low=lab.load(FILES[1]), positive=_positive(lab))
    size = _size(lab)
    pretended, seen = card(room * size), []
    high, low = map(lab.load, FILES)
    assert high.load_device == Card.device, "the pretended card is not in use"
    parts = [_watched(lab, expert, lambda: seen.append(pretended.loaded())) for expert in (high, low)]
    ours = lab.turbo(parts[0], model_low=parts[1], positive=_positive(lab))
    assert torch.equal(ours, expected)
    assert len(seen) == 4
    for step, loaded in enumerate(seen):
        working, resting = (high, low) if step < 2 else (low, high)
        assert loaded[id(working.model)] == pytest.approx(size, rel=0.01), "the expert at work is not all there"
        assert sum(loaded.values()) <= pretended.capacity
        waits = loaded.get(id(resting.model), 0)
        if step < 2:
            assert waits == 0, "the low-noise expert was loaded before its turn"
        else:
            assert waits == pytest.approx(size, rel=0.01) if both_stay else waits < size / 2


def test_lora_on_both_experts_survives_the_hand_over(lab, card):
    """The high-noise expert goes out with its patches and comes back in for the next video: the same one."""
    key = "diffusion_model.blocks.0.self_attn.q.weight"
    pretended = card(1.5 * _size(lab))
    experts = [model.clone() for model in map(lab.load, FILES)]
    for model in experts:
        model.add_patches({key: ("diff", (0.1 * lab.draw(256, 256, seed=3),))})
    run = lambda: lab.turbo(experts[0], model_low=experts[1], positive=_positive(lab))  # noqa: E731
    first = run()
    assert torch.equal(first, run())
    assert sum(pretended.loaded().values()) <= pretended.capacity


@pytest.mark.parametrize("interrupted", [False, True])
def test_dropping_the_outputs_frees_both_experts(comfy, lab, interrupted):
    """Without the garbage collector: no cycle of ours keeps 14 GB until it happens to run."""
    high, low = map(lab.load, FILES)
    networks = [weakref.ref(model.model.diffusion_model) for model in (high, low)]
    parts = [lab.attention(high, 0.3), lab.attention(low, 0.3)]
    if interrupted:
        parts[1] = _watched(lab, parts[1], comfy.model_management.interrupt_current_processing)
    gc.collect()
    gc.disable()
    try:
        try:
            samples = lab.turbo(parts[0], model_low=parts[1], positive=_positive(lab))
        except comfy.model_management.InterruptProcessingException:
            samples = None
        assert (samples is None) == interrupted
        del high, low, parts
        assert [network() is None for network in networks] == [True, True]
    finally:
        gc.enable()
        comfy.model_management.cleanup_models_gc()


def test_quantizing_on_the_fly_leaves_one_network(lab):
    """The MODEL that QuantizeW8A8 was given can go as soon as nobody else uses it."""
    gc.collect()
    gc.disable()
    try:
        model = lab.load()
        source = weakref.ref(model.model.diffusion_model)
        model = lab.quantize(model)
        lab.turbo(model, steps=1)
        assert source() is None, "the unquantized weights are still held"
        result = weakref.ref(model.model.diffusion_model)
        del model
        assert result() is None
    finally:
        gc.enable()
