"""Training computes in bfloat16 only where the device multiplies it: elsewhere it is 7 to 60 times slower."""

import pytest
import torch

from tests.helpers.training import clips, model
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


@pytest.mark.parametrize("ampere", [True, False])
def test_a_card_that_emulates_bfloat16_has_none(ampere, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or ampere)
    assert precision.has_bfloat16.__wrapped__("cuda") == ampere


def test_weights_get_gradients_after_a_pass_without(monkeypatch):
    # the cache of autocast kept copies of them that had none, in torch before 2.11: only there the last line can fail
    monkeypatch.setattr(precision, "has_bfloat16", lambda kind: True)
    layer = torch.nn.Linear(2, 2)
    with precision.autocast("cpu"):
        assert not torch.is_autocast_cache_enabled()
        with torch.no_grad():
            layer(torch.ones(1, 2))
        layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad is not None
