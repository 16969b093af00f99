"""Our Muon against torch's, which computes in bfloat16, and against what it is meant to do."""

import pytest
import torch

from turbo_core.train import precision
from turbo_core.train.muon import Muon, orthogonalized

SHAPES = (24, 24), (16, 40), (40, 16), (1, 8)  # square, wide, tall, one row


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon to compare with")
@pytest.mark.parametrize("bfloat16", [True, False])
def test_it_goes_where_torchs_goes(bfloat16, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda kind: bfloat16)
    random = torch.Generator().manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=random)) for shape in SHAPES]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    optimizers = Muon(ours, 0.02), torch.optim.Muon(theirs, 0.02, weight_decay=0.0)
    for _ in range(5):
        for one, other in zip(ours, theirs):
            one.grad = torch.randn(one.shape, generator=random)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, first in zip(ours, theirs, start):
        assert (one - other).norm() < 0.05 * (other - first).norm()  # what bfloat16 rounds


def test_singular_values_come_near_one():
    for shape in (*SHAPES, (128, 128)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        values = torch.linalg.svdvals(orthogonalized(matrix).float())
        assert values.max() < 1.3 and values.quantile(0.1) > 0.6, values  # a square matrix has some that stay small
    assert torch.equal(orthogonalized(torch.zeros(4, 4)).float(), torch.zeros(4, 4))


def test_its_state_is_kept_and_taken():
    matrix = torch.nn.Parameter(torch.eye(3))
    matrix.grad = torch.arange(9.0).view(3, 3)
    first = Muon([matrix], 0.1)
    first.step()
    second = Muon([matrix], 0.1)
    second.load_state_dict(first.state_dict())
    kept, taken = (optimizer.state[matrix]["momentum_buffer"] for optimizer in (first, second))
    assert torch.equal(kept, taken) and kept.abs().sum() > 0
    untouched = torch.nn.Parameter(torch.eye(3))
    Muon([untouched], 0.1).step()  # no gradient, no step
    assert torch.equal(untouched, torch.eye(3))
