"""RoPE, the timestep's embedding, and working in slices of tokens."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.tensors import assert_close, gaussian
from tests.helpers.wan import complex_rope, rotate
from turbo_core.rope import rope_angles
from turbo_core.wan import apply_rope, layers, model, timestep_embedding


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 5, 7), (2, 1, 11), (21, 3, 2)])
def test_rope_is_a_complex_rotation(grid, d):
    x = gaussian(2, math.prod(grid), 3, d)
    angles = rope_angles(grid, d)
    assert angles.shape == (math.prod(grid), d // 2) and angles.dtype == torch.float32
    out = apply_rope(x, angles)
    torch.testing.assert_close(out.double(), rotate(x.double(), complex_rope(grid, d)), rtol=1e-5, atol=1e-5)
    half = apply_rope(x.bfloat16(), angles)
    assert half.dtype == torch.bfloat16
    assert_close(half, out, 0.005)


def test_rope_pairs_of_a_128_channel_head():
    angles = rope_angles((2, 2, 2), 128)
    time, height, width = angles[4], angles[2], angles[1]
    assert time.nonzero().flatten().tolist() == list(range(22))
    assert height.nonzero().flatten().tolist() == list(range(22, 43))
    assert width.nonzero().flatten().tolist() == list(range(43, 64))
    assert (time[0], height[22], width[43]) == (1, 1, 1)
    assert time[1].item() == pytest.approx(10000 ** (-2 / 44)) and width[44].item() == pytest.approx(10000 ** (-2 / 42))


def test_rope_in_slices_is_the_same(monkeypatch):
    x, angles = gaussian(2, 300, 3, 128, dtype=torch.bfloat16), rope_angles((3, 10, 10), 128)
    whole = apply_rope(x, angles)
    monkeypatch.setattr(layers, "BITE", 2 * 128 * 3 * 128)
    assert torch.equal(apply_rope(x, angles), whole)


def test_timestep_embedding_is_cosines_then_sines():
    out = timestep_embedding(torch.tensor([0.0, 1.0, 932.0]), 256)
    assert out.shape == (3, 256) and out.dtype == torch.float32
    assert out[0].tolist() == [1.0] * 128 + [0.0] * 128
    for t, row in zip((1.0, 932.0), out[1:]):
        for i in (0, 1, 64, 127):
            angle = t * 10000 ** (-i / 128)
            assert row[i].item() == pytest.approx(math.cos(angle), abs=1e-7)
            assert row[128 + i].item() == pytest.approx(math.sin(angle), abs=1e-7)


class NoFloat64(TorchDispatchMode):
    """A device without float64, as Apple GPUs are: the meta device, on which nothing else is computed here."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        assert not (isinstance(out, torch.Tensor) and out.is_meta and out.dtype == torch.float64), function
        return out


def test_devices_without_float64(monkeypatch):
    monkeypatch.setattr(model, "widest_float", lambda device: torch.float32)
    timestep = torch.tensor([996.0, 608.0])
    exact = timestep_embedding(timestep, 256)
    with NoFloat64():
        assert rope_angles((3, 4, 5), 128, "meta").shape == (60, 64)
        timestep_embedding(timestep.to("meta"), 256)
    monkeypatch.undo()
    torch.testing.assert_close(timestep_embedding(timestep, 256), exact, rtol=0, atol=2e-4)
