"""How short the way is from a door of turbo_core to the kernels, and how often it asks the same question."""

import sys
import traceback
from collections import Counter

import pytest
import torch
from turbo_core.kernels.int8_mm import int8_mm_kernel

from tests.helpers.int8_operands import quantized as int8_operands
from tests.helpers.tensors import gaussian
from tests.helpers.wan import DIM, HEADS, quantized, weights
from turbo_core import dispatch, errors
from turbo_core.int8 import formats, int8_linear, reference
from turbo_core.kernels import launch
from turbo_core.rope import rope_angles
from turbo_core.wan import WanModel


@pytest.mark.parametrize("fmt", ["block", "row"])
def test_at_most_four_frames_from_the_linear_to_the_launch(fmt, monkeypatch):
    stacks, start = [], type(int8_mm_kernel).__getitem__

    def note(kernel, grid):
        stacks.append([frame.name for frame in traceback.extract_stack()[:-1]])
        return start(kernel, grid)

    monkeypatch.setattr(type(int8_mm_kernel), "__getitem__", note)
    int8_linear(gaussian(5, 200), *int8_operands(fmt, 64, 200, 1))
    below = [stack[stack.index("int8_linear") + 1 :] for stack in stacks]
    print(below)
    assert [frames[-1] for frames in below] == ["run", "run"]  # quantization, product
    assert max(map(len, below)) <= 4


@pytest.fixture
def calls(monkeypatch):
    """How often each of these was called, wherever its name was imported to."""
    counts = Counter()

    def count(function, name):
        def counted(*given, **named):
            counts[name] += 1
            return function(*given, **named)

        for module in [m for n, m in sys.modules.items() if n.partition(".")[0] == "turbo_core"]:
            for alias in [a for a, value in vars(module).items() if value is function]:
                monkeypatch.setattr(module, alias, counted)

    count(launch.run, "launches")
    count(dispatch.use_triton, "use_triton")
    count(errors.check_device, "check_device")
    count(formats.check_scale, "check_scale")
    enter = dispatch.explained.__enter__
    monkeypatch.setattr(dispatch.explained, "__enter__", lambda self: (counts.update(["translations"]), enter(self))[1])
    return counts


def test_a_block_asks_once(calls):
    """A fused SageSLA block in the int8 block format, one video."""
    sd = quantized(weights(sla=True, layers=1), reference.quantize_block, torch.bfloat16)
    block = WanModel.from_state_dict(sd, torch.bfloat16).blocks[0]
    x, context = gaussian(1, 90, DIM, dtype=torch.bfloat16), gaussian(1, 7, DIM, seed=1, dtype=torch.bfloat16)
    modulation, angles = gaussian(1, 6, DIM, seed=2), rope_angles((2, 5, 9), DIM // HEADS)
    calls.clear()
    with torch.no_grad():
        block(x, modulation, context, angles, topk=0.5, precision="int8")
    print(dict(calls))
    bounds = {"launches": 27, "translations": 4, "use_triton": 11, "check_device": 0, "check_scale": 0}
    assert calls["launches"] >= 20 and all(calls[name] <= bound for name, bound in bounds.items()), dict(calls)
