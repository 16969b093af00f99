"""The block map kernels against a sort in float64 and their reference."""

import pytest
import torch
from turbo_core.kernels.block_map import block_map

from turbo_core.kernels import block_map as module
from turbo_core.kernels import launch
from turbo_core.sla.blocks import top_blocks


def whole_numbers(queries, keys, b=1, h=1, d=64, seed=0):
    """Pooled q and k whose scores are whole numbers: exact in any order of summation, with ties."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-2, 3, (b, h, n, d), generator=generator).float() for n in (queries, keys)]


def by_sorting(pooled_q, pooled_k, kept):
    score = pooled_q.double() @ pooled_k.double().transpose(-1, -2)
    score = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return score.sort(dim=-1, descending=True, stable=True).indices[..., :kept].sort(-1).values.int()


# (query blocks, key blocks, D): one of each; less than a tile; ragged second tiles; rows of many programs; a wide row
SIZES = [(1, 1, 64), (2, 3, 128), (3, 17, 64), (65, 66, 128), (70, 5, 64), (2, 1182, 128)]


@pytest.mark.parametrize("queries, keys, d", SIZES)
def test_any_number_of_blocks_is_kept(queries, keys, d):
    q, k = whole_numbers(queries, keys, b=1 + (keys < 20), h=1 + (keys < 20), d=d)
    for kept in {1, max(1, keys // 10), keys // 2 + 1, keys}:
        index = block_map(q, k, kept)
        assert index.dtype == torch.int32
        assert torch.equal(index, by_sorting(q, k, kept))


def test_a_row_of_8192_key_blocks():
    q, k = whole_numbers(1, 8192)
    assert torch.equal(block_map(q, k, 819), by_sorting(q, k, 819))


def test_no_launch_is_larger_than_a_grid_may_be(monkeypatch):
    grids = []
    monkeypatch.setattr(module, "run", lambda kernel, grid, *_: grids.append(grid))
    q = torch.empty(1, 65537, 1, 64, device="meta")  # heads of one tile each: the 65536th does not fit the first launch
    block_map(q, q, 1)
    assert max(grid[1] for grid in grids[::2]) == 65535
    assert sum(grid[1] for grid in grids[::2]) == 65537


def test_the_reference_and_the_score_at_the_threshold():
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 2, 20, 128, generator=generator)
    k = torch.randn(2, 2, 40, 128, generator=generator) + 5 * torch.randn(1, 2, 1, 128, generator=generator)
    index = block_map(q, k, 12, k.mean(2))
    assert (index == top_blocks(q, k, 12)).double().mean() > 0.999
    score = q.double() @ (k - k.mean(2, keepdim=True)).double().transpose(-1, -2)
    worst = score.gather(-1, index.long()).amin(-1)
    assert ((score.topk(12).values[..., -1] - worst).abs() <= 1e-5 * score.abs().amax(-1)).all()
    assert (index.diff(dim=-1) > 0).all()


def test_the_mean_keeps_the_digits_of_the_scores():
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, 2, n, 64, generator=generator) for n in (20, 40))
    moved = k + 3e6 * torch.randn(1, 2, 1, 64, generator=generator)
    mean = moved.double().mean(2)
    exact = by_sorting(q, moved.double() - mean[:, :, None], 10)
    assert (block_map(q, moved, 10, mean.float()) == exact).double().mean() > 0.9
    assert (block_map(q, moved, 10) == exact).double().mean() < 0.7  # so without it digits are lost, on any CPU's sums


def test_ties_go_to_the_lower_block_and_zero_has_no_sign():
    q, k = torch.zeros(1, 1, 3, 64), torch.zeros(1, 1, 8, 64)
    q[..., 0] = 1
    k[0, 0, :, 0] = torch.tensor([-1.0, 0.0, -0.0, 0.0, 2.0, -0.0, 0.0, -3.0])
    for kept, expected in ((1, [4]), (3, [1, 2, 4]), (6, [1, 2, 3, 4, 5, 6]), (7, [0, 1, 2, 3, 4, 5, 6])):
        assert block_map(q, k, kept)[0, 0].tolist() == [expected] * 3


def test_broken_blocks_rank_lowest_and_stay_alone():
    q, k = whole_numbers(5, 20, h=2)
    good = by_sorting(q, k, 7)
    k[0, 0, 3, 5], k[0, 0, 9, 6], k[0, 0, 11, 7] = torch.nan, torch.inf, -torch.inf
    index = block_map(q, k, 7, torch.zeros(1, 2, 64))
    assert torch.equal(index, top_blocks(q, k, 7))
    assert not torch.isin(index[0, 0], torch.tensor([3, 9, 11])).any()
    assert torch.equal(index[0, 1], good[0, 1])
    assert torch.equal(block_map(q, k, 20)[0, 0], torch.arange(20).expand(5, 20))  # kept all the same when all are
    q[0, 1, 2, 3] = torch.nan
    index = block_map(q, k, 7)
    assert index[0, 1, 2].tolist() == list(range(7))  # no score at all: the first blocks
    q[0, 1, 2, 3] = torch.inf
    assert torch.equal(block_map(q, k, 7)[0, 1], top_blocks(q, k, 7)[0, 1])


@pytest.mark.parametrize("scratch, step", [(1, 1), (3 * 64 * 9 * 4, 3)])  # tiles of two heads fall into one launch
def test_working_in_pieces_changes_nothing(scratch, step, monkeypatch):
    q, k = whole_numbers(130, 9, h=2)
    whole, launches = block_map(q, k, 4), []
    run = launch.run
    monkeypatch.setattr(module, "SCRATCH", scratch)
    monkeypatch.setattr(module, "run", lambda *args: launches.append(args[1]) or run(*args))
    assert torch.equal(block_map(q, k, 4), whole)
    assert len(launches) == 2 * -(-6 // step)


def test_impossible_input_is_refused():
    q, k = whole_numbers(3, 5)
    for call in (
        lambda: block_map(q, k, 0),
        lambda: block_map(q, k, 6),
        lambda: block_map(q.half(), k.half(), 1),
        lambda: block_map(q, k[..., :32], 1),
        lambda: block_map(q[..., :32].contiguous(), k[..., :32].contiguous(), 1),
        lambda: block_map(q, k, 1, torch.zeros(1, 2, 64)),
        lambda: block_map(q, k.expand(1, 1, 5, 64).transpose(2, 3).contiguous().transpose(2, 3), 1),
    ):
        with pytest.raises(ValueError):
            call()
