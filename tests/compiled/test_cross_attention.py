"""Cross-attention compiles without spills, to the instructions meant: the sums of q, then the attention kernel."""

import pytest
import torch
from turbo_core.kernels.cross_attention import cross_attention

from tests.helpers import aot, sass


@pytest.mark.parametrize("capability, instruction", [(80, "HMMA"), (89, "HMMA"), (90, "HGMMA")])
def test_cross_attention(capability, instruction):
    q, text = (torch.empty(1, n, 40, 128, dtype=torch.bfloat16, device="meta") for n in (75600, 512))
    weight = torch.empty(40 * 128, device="meta")
    made = sass.launches(cross_attention, q, text, text, norm_weight=weight, quantize=True)
    assert len(made) == 2
    _, attention = (sass.compile_launch(capability, *launch) for launch in made)
    assert any(instruction in name for name in aot.matrix_instructions(attention))
