"""The block map kernels for six cards; runs without TRITON_INTERPRET by test_block_map.py."""

import pytest
import torch

from kernels import block_map as module
from tests.triton_cpu import aot


def compiled(capability, keys, d, monkeypatch):
    kernels = {}

    def run(kernel, grid, arguments, options):
        kernels[kernel.__name__] = aot.compile_for(capability, kernel, *arguments, **options)

    monkeypatch.setattr(module, "run", run)
    module.block_map(torch.zeros(1, 2, 80, d), torch.zeros(1, 2, keys, d), max(1, keys // 10), torch.zeros(1, 2, d))
    for kernel in kernels.values():
        assert aot.fits(capability, kernel)
        assert aot.spills(kernel) == 0
    return kernels


@pytest.mark.parametrize("capability", aot.SHARED_MEMORY)
def test_scores_and_rows(capability, monkeypatch):
    kernels = compiled(capability, 1182, 128, monkeypatch)  # 75600 tokens
    assert set(kernels) == {"_score_kernel", "_select_kernel"}
    # three products of tf32 stand for one of float32
    assert any("MMA" in name for name in aot.matrix_instructions(kernels["_score_kernel"]))


@pytest.mark.parametrize("keys", [5, 512, 8191])  # many rows to a program; 32760 tokens; the longest row
@pytest.mark.parametrize("capability", [80, 90])
def test_other_widths(capability, keys, monkeypatch):
    compiled(capability, keys, 64, monkeypatch)
