"""A whole model of fused blocks through Triton's interpreter, against the same on torch twins; TRITON_INTERPRET=1."""

import functools

import pytest
import torch

from tests.triton_cpu.interpreter import repair

repair()

from tests.test_wan import inputs, quantized, relative, weights  # noqa: E402 (after the interpreter is repaired)
from turbo_core import dispatch, int8, wan_fused  # noqa: E402
from turbo_core.wan import WanModel  # noqa: E402


@pytest.mark.parametrize(
    ("quantize", "topk", "precision", "batch"),
    [
        (int8.quantize_block, None, "bf16", 1),
        (int8.quantize_rows, None, "bf16", 2),  # blocks of 128 rows run through samples
        (int8.quantize_block, 0.5, "int8", 1),  # attention hands over int8
    ],
)
def test_kernels_make_the_model_that_the_twins_make(monkeypatch, quantize, topk, precision, batch):
    # 2 * 5 * 9 = 90 tokens: less than a block of queries, a ragged block of keys
    args = inputs(batch, grid=(2, 10, 18))
    with dispatch.without_kernels():
        sd = quantized(weights(sla=True, layers=1), quantize)
    model = WanModel.from_state_dict(sd, dtype=torch.bfloat16)
    run = functools.partial(model, *args, topk=topk, precision=precision)
    assert wan_fused.pays(torch.device("cpu"))
    ours = run()
    with dispatch.without_kernels():
        assert not wan_fused.pays(torch.device("cpu"))
        layers = run()
        monkeypatch.setattr(wan_fused, "pays", lambda device: True)
        theirs = run()
    print(f"twins {relative(ours, theirs):.1e}, layers {relative(ours, layers):.1e}")
    assert relative(ours, theirs) < 1e-2 and relative(ours, layers) < 2e-2
