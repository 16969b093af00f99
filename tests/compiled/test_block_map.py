"""The block map kernels compile for every card, without spills."""

import pytest
import torch
from turbo_core.kernels.block_map import block_map

from tests.helpers import aot, sass


def compiled(capability, keys, d):
    q, k = torch.zeros(1, 2, 80, d), torch.zeros(1, 2, keys, d)
    made = sass.launches(block_map, q, k, max(1, keys // 10), torch.zeros(1, 2, d))
    return {kernel.__name__: sass.compile_launch(capability, kernel, *given) for kernel, *given in made}


@pytest.mark.parametrize("capability", aot.CARDS)
def test_scores_and_rows(capability):
    kernels = compiled(capability, 1182, 128)  # 75600 tokens
    assert set(kernels) == {"_score_kernel", "_select_kernel"}
    # three products of tf32 stand for one of float32
    assert any("MMA" in name for name in aot.matrix_instructions(kernels["_score_kernel"]))


@pytest.mark.parametrize("keys", [5, 512, 8191])  # many rows to a program; 32760 tokens; the longest row
@pytest.mark.parametrize("capability", [80, 90])
def test_other_widths(capability, keys):
    compiled(capability, keys, 64)
