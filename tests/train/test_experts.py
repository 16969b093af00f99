"""Two experts train as one network: each sees the times that are its own, with the image it is given."""

import pytest
import torch

from tests.helpers.training import clips
from turbo_core.train import models, optim, sparsify, teacher
from turbo_core.train.experts import Experts
from turbo_core.wan import WanModel

SIZES = {"dim": 64, "ffn_dim": 96, "num_heads": 1, "num_layers": 1, "text_dim": 8, "in_dim": 36}


def pair(boundary=0.9):
    torch.manual_seed(0)
    experts = Experts(WanModel(**SIZES, sla=True), WanModel(**SIZES, sla=True), boundary)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return experts


def inputs(*times):
    torch.manual_seed(1)
    count = len(times)
    told = {"context": torch.randn(count, 6, 8), "context_bias": torch.randn(count, 6)}
    told |= {
        "y": torch.randn(count, 20, 3, 4, 4),
        "places": (torch.tensor([0, 2, 5]), torch.arange(2), torch.arange(2)),
    }
    return torch.randn(count, 16, 3, 4, 4), torch.tensor(times), told


def test_each_clip_goes_to_its_expert():
    experts, (x, times, told) = pair(), inputs(950.0, 300.0, 900.0, 899.0)
    velocity = experts(x, times, **told)
    high, low = (model(x, times, **told) for model in (experts.high, experts.low))
    assert (high - low).abs().min(1).values.max() > 0  # they differ
    for row, expected in enumerate((high, low, high, low)):
        torch.testing.assert_close(velocity[row], expected[row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("time", [950.0, 300.0])
def test_an_expert_without_clips_learns_nothing_and_changes_nothing(time):
    experts, (x, times, told) = pair(), inputs(time, time)
    busy, idle = (experts.high, experts.low) if time > 900 else (experts.low, experts.high)
    velocity = experts(x, times, **told, topk=1.0)
    torch.testing.assert_close(velocity, busy(x, times, **told, topk=1.0), atol=1e-5, rtol=1e-4)
    velocity.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in busy.parameters())
    assert all(p.grad is None for p in idle.parameters())


@pytest.mark.parametrize("gradient", [None, 0.0])  # alone, and beside other processes that wait for a gradient
def test_an_expert_without_clips_keeps_its_weights_for_all_its_momentum(gradient):
    experts, (x, times, told) = pair(), inputs(950.0, 300.0)
    optimizer = optim.Both(experts, 1e-2, 1e-2, optim.in_blocks)
    for _ in range(2):
        experts(x, times, **told, topk=1.0).square().mean().backward()
        optimizer.step(1.0)
    high, low = ([p.detach().clone() for p in part.parameters()] for part in experts.parts)
    experts.low(x, times, **told, topk=1.0).square().mean().backward()
    for parameter in experts.high.parameters():
        parameter.grad = None if gradient is None else torch.zeros_like(parameter)
    optimizer.step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(high, experts.high.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(low, experts.low.parameters()))


@pytest.mark.parametrize("stage", ["teacher", "sparsify"])
def test_both_experts_move(stage, tmp_path):
    quiet = {"batch": 4, "log": lambda line: None}
    if stage == "teacher":
        moved, history = teacher.train(pair(0.5), clips(images=True), tmp_path, 3, shift=5.0, **quiet)
        before = pair(0.5)
    else:
        moved, history = sparsify.train(pair(), pair(), clips(images=True), tmp_path, 4, topk=0.5, **quiet)
        before = pair()
    assert len(history) == (3 if stage == "teacher" else 4)
    for name in ("high", "low"):
        new, old = (torch.cat([p.flatten() for p in getattr(e, name).parameters()]) for e in (moved, before))
        assert (new - old).abs().max() > 1e-5, name


def test_guidance_doubles_the_image_too():
    experts, (x, times, told) = pair(), inputs(950.0, 300.0)
    empty = {"context": torch.randn(1, 6, 8), "context_bias": torch.randn(1, 6)}
    ours = teacher.guided(experts, x, times / 1000, told, empty, 3.0)
    blank = told | {name: part.expand(2, *part.shape[1:]) for name, part in empty.items()}
    wanted, unwanted = (experts(x, times, **given) for given in (told, blank))
    torch.testing.assert_close(ours, unwanted + 3 * (wanted - unwanted), atol=1e-4, rtol=1e-4)


def test_two_files_come_back_in_their_order(tmp_path):
    experts, files = pair(), [tmp_path / "high.safetensors", tmp_path / "low.safetensors"]
    models.save_models(experts, files)
    back = models.load_models(files, 0.8)
    assert back.boundary == 0.8
    for name in ("high", "low"):
        new, old = (getattr(e, name).blocks[0].ffn[0].weight for e in (back, experts))
        assert torch.equal(new, old.bfloat16().float())
    assert not torch.equal(back.high.blocks[0].ffn[0].weight, back.low.blocks[0].ffn[0].weight)
