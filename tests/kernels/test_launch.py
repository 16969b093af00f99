"""What becomes of a launch that fails: made again as shipped, explained, or passed on."""

import pytest
import torch
from turbo_core.kernels.int8_mm import int8_mm, int8_mm_kernel

from tests.helpers.int8_operands import quantized
from tests.helpers.oracles import assert_near, product
from tests.helpers.tensors import gaussian
from turbo_core.errors import TurboError
from turbo_core.int8 import int8_linear
from turbo_core.kernels import int8_configs, launch


@pytest.fixture
def fail(monkeypatch):
    """fail(error, where): every launch whose options fit raises the error."""
    start = type(int8_mm_kernel).__getitem__

    def change(error, where=lambda options: True):
        def start_or_fail(kernel, grid):
            def call(*arguments, **options):
                if where(options):
                    raise error
                return start(kernel, grid)(*arguments, **options)

            return call

        monkeypatch.setattr(type(int8_mm_kernel), "__getitem__", start_or_fail)

    return change


TOO_LARGE = RuntimeError("out of resource: shared memory\nsecond line")


def test_a_tuned_launch_that_fails_is_made_again_as_shipped(fail, monkeypatch, caplog):
    table = {"block plain short": int8_configs.DEFAULT._replace(block_m=64)}
    monkeypatch.setattr(int8_configs, "tuned_table", lambda device: table)
    fail(TOO_LARGE, lambda options: options.get("BLOCK_M") == 64)
    x, w = quantized("block", 5, 200, 0), quantized("block", 64, 200, 1)
    for _ in range(2):
        assert_near(int8_mm(*x, *w), product(x, w), torch.finfo(torch.bfloat16).eps / 2)
    assert len(caplog.records) == 1 and "tuned launch table" in caplog.text and not table


def test_a_shipped_launch_that_fails_gives_way_to_the_plainest_once(fail, monkeypatch, caplog):
    monkeypatch.setattr(int8_configs, "_FAILED", set())
    row = int8_configs.DEFAULT._replace(variant="persistent")
    monkeypatch.setattr(int8_configs, "shipped", lambda *_: row)
    tried = []
    fail(TOO_LARGE, lambda options: tried.append("SPECIALIZE" in options) or tried[-1])
    x, w = quantized("block", 5, 256, 0), quantized("block", 64, 256, 1)
    for _ in range(2):
        assert_near(int8_mm(*x, *w), product(x, w), torch.finfo(torch.bfloat16).eps / 2)
    assert tried == [True, False, False]
    assert len(caplog.records) == 1 and "block plain products" in caplog.text and "shared memory" in caplog.text


def test_a_launch_that_fails_as_shipped_is_explained(fail):
    fail(TOO_LARGE, lambda options: "BLOCK_M" in options)
    x, w = quantized("block", 5, 200, 0), quantized("block", 64, 200, 1)
    with pytest.raises(launch.LaunchError, match=r"int8_mm_kernel cannot run on cpu .*shared memory\)$"):
        int8_mm(*x, *w)
    with pytest.raises(TurboError, match=r"int8_mm_kernel cannot run on cpu .*shared memory\).*TURBOWAN_KERNELS=t"):
        int8_linear(gaussian(5, 200), *w)


def test_memory_that_is_short_is_no_fault_of_the_kernel(fail):
    fail(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        int8_mm(*quantized("block", 5, 200, 0), *quantized("block", 64, 200, 1))
