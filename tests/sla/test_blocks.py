"""Block maps against loops in float64: by top-k and by cumulative score."""

import pytest
import torch

from tests.helpers.qkv import BLOCKS, LENGTHS, qkv
from turbo_core import sla
from turbo_core.diagnostics.compare import key_block_mass
from turbo_core.sla import blocks


def slow_block_map(q, k, topk, block_q, block_k):
    """The published block map, block by block in float64."""
    q, k = q.double(), k.double()
    k = k - k.mean(1, keepdim=True)
    b, _, h, _ = q.shape
    rows = []
    for i in range(b):
        for j in range(h):
            pooled_k = torch.stack([block.mean(0) for block in k[i, :, j].split(block_k)])
            kept = max(1, int(topk * len(pooled_k)))
            for block in q[i, :, j].split(block_q):
                scores = (pooled_k @ block.mean(0)).tolist()
                best = sorted(range(len(scores)), key=lambda n: (-scores[n], n))[:kept]
                rows.append(sorted(best))
    return torch.tensor(rows).view(b, h, -1, len(rows[0]))


@pytest.mark.parametrize("block_q, block_k", BLOCKS)
@pytest.mark.parametrize("length", LENGTHS)
def test_block_map_against_loops(length, block_q, block_k):
    for topk in (0.15, 0.5, 1.0):
        q, k, _ = qkv(length, b=2, h=3, seed=length)
        k += 5  # a common offset changes no choice
        index = sla.block_map(q, k, topk, block_q, block_k)
        assert index.dtype == torch.int32
        assert torch.equal(index.long(), slow_block_map(q, k, topk, block_q, block_k))


@pytest.mark.parametrize("length, keys", [(300, 77), (65, 512), (1, 200)])
def test_block_map_for_other_keys_than_queries(length, keys):
    q, k, _ = qkv(length, keys, b=2, h=2, d=128)
    assert torch.equal(sla.block_map(q, k, 0.4).long(), slow_block_map(q, k, 0.4, 128, 64))


@pytest.mark.parametrize("topk", [0.0, 0.05, 0.1, 0.15, 0.29, 0.3, 0.999, 1.0])
def test_block_map_keeps_the_floor_of_topk_but_never_nothing(topk):
    for count in (1, 2, 10, 20, 100):
        q, k, _ = qkv(1, 64 * count)
        index = sla.block_map(q, k, topk)
        assert index.shape == (1, 1, 1, max(1, int(topk * count)))
        assert (index.diff(dim=-1) > 0).all() and index.min() >= 0 and index.max() < count


def test_ties_go_to_the_lower_block():
    # whole numbers and 8 blocks, so that every score is exact in any order of summation
    q, k, _ = qkv(256, 512, h=2)
    q = q.sign()
    assert sla.block_map(q, torch.ones_like(k), 0.375).tolist() == [[[[0, 1, 2]] * 2] * 2]
    k = torch.ones_like(k)
    k[:, 64 * 6 : 64 * 7] += q[:, :128].mean(1, keepdim=True).sign()  # one winner, seven equals behind it
    assert sla.block_map(q[:, :128], k, 0.375).tolist() == [[[[0, 1, 6]]] * 2]


def test_a_large_common_key_offset_changes_no_choice():
    q, k, _ = qkv(300, b=2, h=2)
    offset = 1000 * torch.randn(1, 1, 2, 64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(sla.block_map(q, k + offset, 0.5).long(), slow_block_map(q, k, 0.5, 128, 64))


def slow_covering_map(q, k, coverage, block_q=128, block_k=64):
    """Rows of block numbers, block by block in float64; as many queries as keys are the same tokens."""
    q, k = q.double(), k.double()
    rows = []
    for i in range(q.shape[0]):
        for j in range(q.shape[2]):
            pooled_k = torch.stack([block.mean(0) for block in k[i, :, j].split(block_k)])
            for r, block in enumerate(q[i, :, j].split(block_q)):
                share = (pooled_k @ block.mean(0) * q.shape[-1] ** -0.5).softmax(0).tolist()
                chosen, total = set(), 0.0
                for n in sorted(range(len(share)), key=lambda n: (-share[n], n)):
                    if total >= coverage and chosen:
                        break
                    chosen.add(n)
                    total += share[n]
                if q.shape[1] == k.shape[1]:
                    first = r * block_q // block_k
                    chosen |= set(range(first, min(first + block_q // block_k, len(share))))
                rows.append(sorted(chosen))
    return rows


def rows_of(index, counts):
    return [row[:n].tolist() for row, n in zip(index.flatten(0, 2), counts.flatten())]


# ragged in both; one token; other keys than queries (no block is a row's own)
@pytest.mark.parametrize("length, keys", [(720, 720), (1, 1), (63, 63), (300, 500)])
@pytest.mark.parametrize("coverage", [0.0, 0.3, 0.7, 0.95])
def test_covering_map_against_loops(length, keys, coverage):
    q, k, _ = qkv(length, keys, b=2, h=3, seed=length)
    q *= torch.tensor([1.0, 20.0, 90.0])[:, None]  # pooled scores that are even, uneven, one block's alone
    index, counts = sla.covering_map(q, k + 5, coverage)
    assert index.dtype == counts.dtype == torch.int32
    assert rows_of(index, counts) == slow_covering_map(q, k, coverage)
    assert index.shape[-1] == counts.max()
    for row, n in zip(index.flatten(0, 2).tolist(), counts.flatten().tolist()):
        assert set(row[n:]) <= {row[n - 1]}


@pytest.mark.parametrize("blocks", BLOCKS)
def test_covering_map_keeps_the_blocks_of_the_rows_own_tokens(blocks):
    q, k, _ = qkv(300)
    q[:, 128:], k[:, 64:128] = -5, 5  # all but the first rows want block 1 least
    q[:, :128] = 5
    rows = rows_of(*sla.covering_map(q, k, 0.1, *blocks))
    assert rows == slow_covering_map(q, k, 0.1, *blocks)
    at = 64 // blocks[0]
    assert 64 // blocks[1] in rows[at]


def test_covering_map_in_pieces_and_in_any_order_of_heads(monkeypatch):
    q, k, _ = qkv(720, b=2, h=5)
    whole = sla.covering_map(q * 9, k, 0.6)
    monkeypatch.setattr(blocks, "SLICE", 1)
    assert all(map(torch.equal, sla.covering_map(q * 9, k, 0.6), whole))
    order = torch.tensor([3, 1, 4, 0, 2])
    index, counts = sla.covering_map(q[:, :, order] * 9, k[:, :, order], 0.6)
    assert torch.equal(index, whole[0][:, order]) and torch.equal(counts, whole[1][:, order])


def test_uneven_rows_get_what_they_need():
    """One head looks everywhere, one at few places: at equal cost the share of attention kept is more even."""
    q, k, _ = qkv(1280, h=2)
    direction = torch.randn(64, generator=torch.Generator().manual_seed(2)).sign()
    k[:, 192:256, 1] += 2 * direction
    q[:, :, 1] += 2 * direction
    index, counts = sla.covering_map(q, k, 0.5)
    spread, sharp = counts.float().mean(-1)[0].tolist()
    assert sharp < 5 < 8 < spread
    rows = torch.arange(0, 1280, 7)
    recalls = []
    for chosen in (index, sla.block_map(q, k, (spread + sharp) / 2 / 20)):
        mass = key_block_mass(q, k, rows)
        kept = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, chosen[:, :, rows // 128].long(), True)
        recalls.append((mass * kept).sum(-1).mean(-1)[0])
    assert recalls[0].min() > recalls[1].min() + 0.1


@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_number_keeps_no_block_but_its_own(which, bad):
    q, k, _ = qkv(640, h=2)
    clean = rows_of(*sla.covering_map(q, k, 0.6))
    {"q": q, "k": k}[which][0, 200, 0, 5] = bad  # query block 1, key block 3, head 0
    rows = rows_of(*sla.covering_map(q, k, 0.6))
    assert rows[5:] == clean[5:]  # the other head
    if which == "q":
        assert rows[:1] + rows[2:] == clean[:1] + clean[2:]
        assert {2, 3} <= set(rows[1])
    else:
        assert [3 in row for row in rows[:5]] == [False, True, False, False, False]
        assert all(len(row) >= 4 for row in rows[:5])
