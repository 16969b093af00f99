"""Quantization kernels compile for every card, without spills, in wide loads and stores."""

import pytest
import torch

from tests.helpers import aot, sass
from turbo_core.kernels import quantize

BF16 = torch.bfloat16


@pytest.mark.parametrize("dtype, capability", [(torch.float32, 90), *((BF16, card) for card in aot.CARDS)])
def test_blocks(dtype, capability):
    [launch] = sass.launches(quantize.quantize_block, torch.empty(256, 5120, dtype=dtype))
    compiled = sass.compile_launch(capability, *launch)
    assert sass.registers(compiled) <= 128  # two programs of 8 warps on a multiprocessor
    found = sass.memory(compiled)
    # 64 values a thread, read and written once, 16 bytes at a time; the one narrow store is the scale
    assert found == {"LDG 128": 4 * dtype.itemsize, "STG 128": 4, "STG 32": 1}, found


# several rows a program; the widest
@pytest.mark.parametrize("k, capability", [(1536, 90), *((13824, card) for card in aot.CARDS)])
def test_rows(k, capability):
    [launch] = sass.launches(quantize.quantize_rows, torch.empty(64, k, dtype=BF16))
    compiled = sass.compile_launch(capability, *launch)
    assert sass.registers(compiled) <= 168  # three programs of 4 warps, 83 KB of x under way
    found = sass.memory(compiled)
    _, _, tile = launch
    values = tile["ROWS"] * tile["PARTS"] * tile["WIDTH"] // (32 * tile["num_warps"])
    assert values <= 112
    assert found == {"LDG 128": values // 8, "STG 128": values // 16, "STG 32": 1}, found
