"""The measures of TurboCompare against dense attention in float64, its table and its heat maps."""

import math

import numpy as np
import pytest
import torch

from turbo_core.diagnostics.compare import (
    TOPKS,
    attention_recall,
    error_of,
    key_block_mass,
    panels,
    picture,
    recall_by_topk,
    sample_tokens,
    squared_norms,
    table,
)
from turbo_core.sla import block_map, covering_map


def draw_qk(length, heads=2, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(batch, length, heads, 64, generator=generator) for _ in range(2))


def recall_in_float64(q, k, index, rows, block_q=128, block_k=64):
    """The whole attention matrix, one mask: nothing shared with what it checks."""
    q, k = q.double().transpose(1, 2), k.double().transpose(1, 2)
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
    kept = torch.zeros_like(weights, dtype=torch.bool)
    for b, h, i in np.ndindex(*index.shape[:3]):
        for j in index[b, h, i].tolist():
            kept[b, h, i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k] = True
    return (weights * kept).sum(-1)[:, :, rows]


# 384: whole blocks; 300: ragged in queries and keys; 50: one block of either, less than full; batch > 1 once
@pytest.mark.parametrize(("length", "batch", "topk"), [(384, 1, 0.5), (300, 2, 0.4), (300, 1, 0.0), (50, 1, 0.3)])
def test_recall_equals_float64(length, batch, topk):
    q, k = draw_qk(length, batch=batch)
    index, rows = block_map(q, k, topk), sample_tokens(length, 40)
    ours = attention_recall(q, k, index, rows)
    assert ours.shape == (batch, 2, min(length, 40))
    torch.testing.assert_close(ours.double(), recall_in_float64(q, k, index, rows), atol=1e-5, rtol=0)


def test_recall_by_cumulative_score_counts_each_block_once():
    q, k = draw_qk(600)
    q[:, 128:256] *= 5  # one row needs fewer blocks than the others: its last is repeated
    (index, counts), rows = covering_map(q, k, 0.6), sample_tokens(600, 128)
    assert counts.min() < counts.max()
    together = recall_by_topk(q, k, (0.1, 0.3), rows, coverage=0.6)
    torch.testing.assert_close(together[0].double(), recall_in_float64(q, k, index, rows), atol=1e-5, rtol=0)
    assert torch.equal(together[1], attention_recall(q, k, block_map(q, k, 0.3), rows))


def test_everything_kept_is_all_of_the_mass():
    q, k = draw_qk(300)
    torch.testing.assert_close(attention_recall(q, k, block_map(q, k, 1.0)), torch.ones(1, 2, 128))


def test_recall_of_several_topk_is_that_of_each_and_rises():
    q, k = draw_qk(600)
    together = recall_by_topk(q, k)
    for topk, shares in zip(TOPKS, together):
        assert torch.equal(shares, attention_recall(q, k, block_map(q, k, topk)))
    assert (together.diff(dim=0) >= -1e-6).all()
    assert together[0].mean() < 0.5 < together[-1].mean(), "random keys: kept blocks cannot carry much at 0.05"


def test_another_block_size_is_meant_by_both():
    q, k = draw_qk(200)
    index, rows = block_map(q, k, 0.5, 32, 16), torch.arange(200)
    ours = attention_recall(q, k, index, rows, 32, 16)
    torch.testing.assert_close(ours.double(), recall_in_float64(q, k, index, rows, 32, 16), atol=1e-5, rtol=0)


def test_mass_of_half_precision_inputs_is_summed_in_float32():
    q, k = (x.bfloat16() for x in draw_qk(4096, heads=1))
    mass = key_block_mass(q, k, torch.arange(8))
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass.sum(-1), torch.ones(1, 1, 8), atol=1e-5, rtol=0)


def test_sampled_tokens_are_distinct_and_the_same_again():
    tokens = sample_tokens(1000, 100)
    assert torch.equal(tokens, sample_tokens(1000, 100)) and len(tokens.unique()) == 100
    assert tokens.max() < 1000 and (tokens.diff() > 0).all() and tokens.max() > 500
    assert torch.equal(sample_tokens(5, 100), torch.arange(5))


def test_error_adds_up_over_parts_and_survives_zeros():
    a, b = torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0))
    whole = ((a - b).double().norm() / b.double().norm()).item()
    assert error_of(squared_norms(a[:1], b[:1]) + squared_norms(a[1:], b[1:])) == pytest.approx(whole, rel=1e-6)
    zero = torch.zeros(3)
    assert error_of(squared_norms(zero, zero)) == 0.0
    assert error_of(squared_norms(zero + 1, zero)) == math.inf
    assert math.isnan(error_of(squared_norms(zero + math.nan, zero + 1)))


def figures(steps=2, blocks=3):
    errors = [[0.001 * 10**b for b in range(blocks)] for _ in range(steps)]
    recall = torch.full((steps, blocks, 1 + len(TOPKS), 2), 0.9)
    recall[:, 1:2, 0] = 0.25
    return [0.98, 0.6, 0.0][-steps - 1 :], errors, [0.02] * steps, recall


def test_table_says_what_was_found():
    text = table(["A and B"], *figures())
    assert "0.9800   2.00 %" in text and "68.33 %" in text, "x0 error, mean of the kept shares"
    assert "B keeps least in blocks 1: candidates" in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_table_and_panels_without_any_attention_seen():
    sigmas, errors, denoised, recall = figures()
    recall.fill_(math.nan)
    assert "could not be seen" in table([], sigmas, errors, denoised, recall)
    assert [panel.kind for panel in panels(sigmas, errors, denoised, recall)] == ["error"]


def test_panels_average_what_they_say():
    error, kept, by_topk = panels(*figures())
    assert error.values[0][-1] == 0.02 and kept.values[0][-1] == pytest.approx((0.9 + 0.25 + 0.9) / 3)
    assert by_topk.rows == ["0.05", "0.1", "0.15", "0.2", "0.3", "0.5"] and len(by_topk.values) == 6


def test_the_picture_holds_all_three_maps():
    pytest.importorskip("PIL")
    sigmas, errors, denoised, recall = figures()
    whole = picture("title", ["A", "B"], sigmas, errors, denoised, recall)
    assert whole.dtype == np.uint8 and whole.ndim == 3 and (whole[:, :20] == 255).all()
    seen = picture("title", ["A", "B"], sigmas, errors, denoised, torch.full_like(recall, math.nan))
    assert whole.shape[0] > 2 * seen.shape[0] and whole.shape[1] == seen.shape[1]
