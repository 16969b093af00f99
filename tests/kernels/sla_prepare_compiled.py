"""The preparation kernels of sparse attention for six cards; runs without TRITON_INTERPRET by test_sla_prepare.py."""

import re

import pytest
import torch

from kernels import sla_pool, sla_prepare
from tests.triton_cpu import aot

# The card's own bf16 instruction. ck is made in registers, and only Hopper takes it from shared memory.
BF16 = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
FP8_STORE = re.compile(r"\bF2FP\.\S*E4M3")
ATOMIC = re.compile(r"\b(RED|ATOM|ATOMG)\b")


@pytest.fixture
def compile_all(monkeypatch):
    """compile_all(capability, function, *args): the kernels that the function would launch, compiled for that card."""

    def compile_all(capability, function, *args, **kwargs):
        kernels = {}

        def run(kernel, grid, arguments, options):
            kernels[kernel.__name__] = aot.compile_for(capability, kernel, *arguments, **options)

        for module in (sla_pool, sla_prepare):
            monkeypatch.setattr(module, "run", run)
        function(*args, **kwargs)
        for kernel in kernels.values():
            assert aot.fits(capability, kernel)
            assert aot.spills(kernel) == 0
            assert not ATOMIC.search(kernel.asm["sass"])  # the order of a sum must not depend on who comes first
        return kernels

    return compile_all


def inputs(d, dtype=torch.bfloat16, length=200, h=8):
    """Planes of q, k, v and the raw form, none of them ever read."""
    q, k, v = torch.zeros(3, 1, length, h, d, dtype=dtype).unbind(0)
    sums, weight, table = torch.zeros(2, 1, length), torch.zeros(h * d), torch.zeros(length, d // 2)
    return q, k, v, (sums, weight, weight, 1e-6, table, table)


# 64 channels on one card alone: half the registers of 128
CARDS = [(capability, 128) for capability in aot.SHARED_MEMORY] + [(90, 64)]


@pytest.mark.parametrize("capability, d", CARDS)
def test_means(capability, d, compile_all):
    q, k, v, raw = inputs(d)
    kernels = compile_all(capability, sla_pool.pool_means, q, k, v, *raw)
    assert set(kernels) == {"_pool_kernel", "_finish_kernel"}
    assert "LDG.E.128" in kernels["_pool_kernel"].asm["sass"]  # tokens are read 16 bytes at a time


@pytest.mark.parametrize("capability, d", CARDS)
def test_keys_and_values(capability, d, compile_all):
    _, k, v, (sums, _, weight, *rest) = inputs(d)
    mean = torch.zeros(1, 8, d)
    fp8 = capability >= 89
    kernels = compile_all(capability, sla_prepare.prepare, k, v, mean, mean, True, fp8, True, sums, weight, *rest)
    assert set(kernels) == {"_prepare_kernel", "_sum_kernel"}
    kernel = kernels["_prepare_kernel"]
    assert any(name.startswith(BF16[capability]) for name in aot.matrix_instructions(kernel))
    assert bool(FP8_STORE.search(kernel.asm["sass"])) == fp8


@pytest.mark.parametrize("capability", [80, 90])
def test_one_token_of_one_head(capability, compile_all):
    # sizes of 1 are constants to the compiler, which have not all that a tensor has
    q, k, v, raw = inputs(128, length=1, h=1)
    compile_all(capability, sla_pool.pool_means, q, k, v, *raw)
    mean = torch.zeros(1, 1, 128)
    sums, _, weight, *rest = raw
    compile_all(capability, sla_prepare.prepare, k, v, mean, mean, True, capability >= 89, True, sums, weight, *rest)


@pytest.mark.parametrize("capability, dtype", [(80, torch.float16), (120, torch.bfloat16)])
def test_other_forms_of_keys_and_values(capability, dtype, compile_all):
    _, k, v, (sums, _, weight, *rest) = inputs(128, dtype)
    compile_all(capability, sla_prepare.prepare, k, v, None, None, False, True, True, sums, weight, *rest)
    mean = torch.zeros(1, 8, 128)
    compile_all(capability, sla_prepare.prepare, k, v, mean, mean, fp8=capability >= 89)
