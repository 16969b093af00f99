"""The kernels of block means compile for every card, without spills, in wide loads; no sum depends on who is first."""

import pytest
import torch
from turbo_core.kernels.sla_pool import pool_means

from tests.helpers import aot, sass


def compiled(capability, d, length=200, h=8):
    q, k, v = torch.zeros(3, 1, length, h, d, dtype=torch.bfloat16).unbind(0)  # never read, as all that follows
    sums, weight, table = torch.zeros(2, 1, length), torch.zeros(h * d), torch.zeros(length, d // 2)
    made = sass.launches(pool_means, q, k, v, sums, weight, weight, 1e-6, table, table)
    kernels = {kernel.__name__: sass.compile_launch(capability, kernel, *given) for kernel, *given in made}
    assert set(kernels) == {"_pool_kernel", "_finish_kernel"} and not any(map(sass.atomics, kernels.values()))
    return kernels


# 64 channels on one card alone: half the registers of 128
@pytest.mark.parametrize("capability, d", [(capability, 128) for capability in aot.CARDS] + [(90, 64)])
def test_means(capability, d):
    assert "LDG.E.128" in compiled(capability, d)["_pool_kernel"].asm["sass"]  # tokens are read 16 bytes at a time


def test_one_token_of_one_head():
    # sizes of 1 are constants to the compiler, which have not all that a tensor has
    compiled(90, 128, length=1, h=1)
