"""One evaluation of the MODEL in the real host takes no more than the planner says.

Sparse attention only: the host's dense attention on a CPU without flash attention builds all scores, on a card it
does not.
"""

import pytest
import torch

from tests.helpers.live_bytes import LiveBytes
from turbo_core import checkpoint
from turbo_core.pipeline import plan


@pytest.mark.parametrize(
    ("name", "linears", "topk", "precision"),
    [
        ("TinyWan2.1-T2V.pth", "float", 0.1, "bf16"),
        ("TinyWan2.1-T2V.pth", "float", 0.1, "int8"),
        ("TinyWan2.1-T2V-quant.pth", "int8_block", 0.1, "bf16"),
    ],
)
def test_host_takes_no_more_than_planned(lab, name, linears, topk, precision):
    shape = (1, 16, 5, 32, 36)
    model = lab.load(name, torch.bfloat16)
    model.set_model_compute_dtype(torch.bfloat16)
    model = lab.attention(model, topk, precision)
    lab.denoise(model, shape=(1, 16, 1, 4, 4))  # what is made once stays out of the count
    given = lab.inputs(shape=shape)
    options = {**model.model_options["transformer_options"], "sigmas": given["t"]}
    network = lab.loaded(model)
    # under inference_mode an operation made of others would be seen as one, without what it allocates inside
    with torch.inference_mode(False), torch.no_grad(), LiveBytes() as count:
        network.apply_model(**{k: v.clone() for k, v in given.items()}, transformer_options=options)
    tokens, text = 5 * 16 * 18, given["c_crossattn"].shape[1]
    planned = plan.model_of(checkpoint.inspect(lab.path(name)))
    forecast, moment, _ = plan.step_peak(planned, tokens, linears, topk, precision, text)
    forecast += 1024 * tokens  # the host's RoPE as 2x2 matrices in float32
    print(f"{name} {topk} {precision}: {count.peak / 1e6:.1f} MB, forecast {forecast / 1e6:.1f} MB ({moment})")
    assert 0.5 * forecast < count.peak < 1.1 * forecast
