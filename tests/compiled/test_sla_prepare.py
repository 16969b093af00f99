"""The preparation of keys and values compiles for every card, without spills; no sum depends on who comes first."""

import re

import pytest
import torch
from turbo_core.kernels.sla_prepare import prepare

from tests.helpers import aot, sass

# The card's own bf16 instruction. ck is made in registers, and only Hopper takes it from shared memory.
BF16 = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
FP8_STORE = re.compile(r"\bF2FP\.\S*E4M3")


def compiled(capability, d=128, dtype=torch.bfloat16, length=200, h=8, low_bit=True, raw=True):
    k, v = torch.zeros(2, 1, length, h, d, dtype=dtype).unbind(0)  # never read, as all that follows
    mean, table = torch.zeros(1, h, d), torch.zeros(length, d // 2)
    means = (mean, mean) if low_bit else (None, None)
    given = (torch.zeros(2, 1, length), torch.zeros(h * d), 1e-6, table, table) if raw else ()
    made = sass.launches(prepare, k, v, *means, low_bit, capability >= 89, True, *given)
    kernels = {kernel.__name__: sass.compile_launch(capability, kernel, *given) for kernel, *given in made}
    assert set(kernels) == {"_prepare_kernel", "_sum_kernel"} and not any(map(sass.atomics, kernels.values()))
    return kernels["_prepare_kernel"]


# 64 channels on one card alone: half the registers of 128
@pytest.mark.parametrize("capability, d", [(capability, 128) for capability in aot.SHARED_MEMORY] + [(90, 64)])
def test_keys_and_values(capability, d):
    kernel = compiled(capability, d)
    assert any(name.startswith(BF16[capability]) for name in aot.matrix_instructions(kernel))
    assert bool(FP8_STORE.search(kernel.asm["sass"])) == (capability >= 89)


@pytest.mark.parametrize("capability", [80, 90])
def test_one_token_of_one_head(capability):
    # sizes of 1 are constants to the compiler, which have not all that a tensor has
    compiled(capability, length=1, h=1)


@pytest.mark.parametrize("capability, dtype", [(80, torch.float16), (120, torch.bfloat16)])
def test_other_forms_of_keys_and_values(capability, dtype):
    compiled(capability, dtype=dtype, low_bit=False)
    compiled(capability, dtype=dtype, raw=False)
