"""The norm between a VAE's convolutions compiles for every card, without spills, in wide loads and stores."""

import pytest
import torch

from tests.helpers import aot, sass
from turbo_core.kernels import norm_silu


@pytest.mark.parametrize("k", [96, 192, 384])
@pytest.mark.parametrize("capability", aot.CARDS)
def test_norm_silu(capability, k):
    x, gamma = torch.empty(640, k, dtype=torch.bfloat16), torch.empty(k, dtype=torch.bfloat16)
    [launch] = sass.launches(norm_silu.norm_silu, x, gamma)
    compiled = sass.compile_launch(capability, *launch)
    assert sass.registers(compiled) <= 128  # four programs of 4 warps on a multiprocessor, each with 8 KB under way
    found = sass.memory(compiled)
    assert set(found) <= {"LDG 128", "STG 128", "LDG 16"} and found["STG 128"] == 4, found
    assert found["LDG 16"] <= 1, found  # gamma, once for all rows
