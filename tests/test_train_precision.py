"""Training computes in bfloat16 only where the device multiplies it: elsewhere it is 7 to 60 times slower."""

import pytest
import torch

from tests.train_small import clips, model
from turbo_core.memory import keep_freed_memory
from turbo_core.train import precision, teacher


@pytest.fixture(params=[True, False], ids=["bfloat16", "float32"])
def fast(request, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda kind: request.param)
    return request.param


def test_products_are_in_the_type_that_is_fast(fast):
    with precision.autocast("cpu"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if fast else torch.float32)
    video = precision.conv_layout(torch.ones(2, 3, 4, 5, 6))
    assert video.is_contiguous(memory_format=torch.channels_last_3d) == fast


def test_a_stage_trains_in_that_type(fast, tmp_path, monkeypatch):
    network, seen = model(), []
    network.blocks[0].self_attn.q.register_forward_hook(lambda layer, given, out: seen.append(out.dtype))
    teacher.train(network, clips(), tmp_path, 1, batch=2, log=lambda line: None)
    assert seen == [torch.bfloat16 if fast else torch.float32]


def test_a_card_has_bfloat16():
    assert precision.has_bfloat16("cuda")


def test_freed_memory_is_kept_wherever_this_runs():
    keep_freed_memory()
    assert torch.ones(1 << 22).sum() == 1 << 22
