"""What blocks allocate, traced over the steps of a run: nothing outlives its block, and every step allocates the same.

That is what a host needs that records the allocations of one step and replays them at the next.
"""

import contextlib
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.lab import QUANT, STOCK, T2V

pytestmark = pytest.mark.newer
STEPS = 3


class Trace(TorchDispatchMode):
    """Sizes of the storages that operations make, in order, and those of them that are still referred to."""

    def __init__(self):
        super().__init__()
        self.sizes, self.made = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in known:  # neither a view nor written in place
                    known.add(storage._cdata)
                    self.sizes.append(storage.nbytes())
                    self.made.append(weakref.ref(storage))
        return result

    def alive_beside(self, out):
        """Sizes of what is left, without what was returned."""
        # row statistics live as long as the tensor that they hang on
        held = tree_leaves([out, list(vars(out).values())])
        returned = {t.untyped_storage()._cdata for t in held if isinstance(t, torch.Tensor)}
        left = [storage for storage in (ref() for ref in self.made) if storage is not None]
        return [storage.nbytes() for storage in left if storage._cdata not in returned]


@pytest.fixture
def traced(monkeypatch):
    """A context for a MODEL: the traces of its blocks, in order. No hooks: a block with a hook goes another way."""

    @contextlib.contextmanager
    def tracing(model):
        traces, left = [], []
        block = type(model.model.diffusion_model.blocks[0])
        forward = block.forward

        def watched(self, *args, **kwargs):
            with Trace() as trace:
                out = forward(self, *args, **kwargs)
            traces.append(trace.sizes)
            left.append(trace.alive_beside(out))
            return out

        with monkeypatch.context() as patch:
            patch.setattr(block, "forward", watched)
            yield traces, left

    return tracing


@pytest.fixture(params=["by layers", "fused"])
def way(request, pack, monkeypatch):
    if request.param == "fused":
        monkeypatch.setattr(pack.part("turbo_core.wan.fused"), "pays", lambda device: True)
    return request.param


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        (T2V, None),
        (T2V, {"topk": 0.3, "precision": "int8"}),
        (T2V, {"topk": 0.3, "start_percent": 0.0, "end_percent": 1.0, "min_tokens": 1}),
        (QUANT, None),
        (QUANT, {"topk": 0.3, "precision": "int8", "selection": "cumulative score"}),
        (STOCK, {"topk": 0.3}),
        (STOCK, {"topk": 0.3, "precision": "int8"}),
    ],
)
def test_nothing_outlives_its_block_and_every_step_is_like_the_first(lab, traced, way, name, settings):
    model = lab.load(name)
    model = model if settings is None else lab.attention(model, **settings)
    with traced(model) as (traces, left):
        lab.turbo(model, steps=STEPS)
    blocks = len(traces) // STEPS
    assert blocks == 2 and len(traces) == STEPS * blocks
    assert left == [[]] * len(traces) and all(traces)
    # by coverage, and in int8 as torch emulates it, sizes follow the video
    if not {"selection", "precision"} & set(settings or ()):
        assert traces[blocks : 2 * blocks] == traces[2 * blocks :] == traces[:blocks]


@pytest.mark.parametrize("kind", ["block", "row"])
def test_nor_of_weights_made_in_the_graph(lab, traced, way, kind):
    model = lab.quantize(lab.load(STOCK), kind)
    with traced(model) as (traces, left):
        lab.turbo(model, steps=STEPS)
    assert len(traces) == 2 * STEPS and left == [[]] * len(traces) and traces[:2] == traces[2:4] == traces[4:]


def test_nor_with_a_lora_in_low_vram(comfy, lab, traced, way):
    model = lab.load(QUANT)
    model = lab.merged(model, lab.lora(model))
    model.patch_model(device_to=model.load_device, lowvram_model_memory=1)
    options = {**model.model_options["transformer_options"]}
    with traced(model) as (traces, left):
        for _ in range(STEPS):
            model.model.apply_model(**lab.inputs(), transformer_options={**options, "sigmas": lab.inputs()["t"]})
    model.unpatch_model(model.offload_device)
    assert left == [[]] * len(traces) and traces[2:4] == traces[4:]


def test_the_trace_can_fail(lab, traced, monkeypatch):
    """A block that keeps something is noticed, and one that does more at a later step."""
    model, kept = lab.load(T2V), []
    part = model.model.diffusion_model.blocks[1].ffn
    hook = part.register_forward_hook(lambda module, given, out: kept.append(out + 1) if len(kept) < 2 else None)
    with traced(model) as (traces, left):
        lab.turbo(model, steps=STEPS)
    hook.remove()
    assert [len(sizes) for sizes in left] == [0, 1, 0, 1, 0, 0] and traces[2:4] != traces[4:]
