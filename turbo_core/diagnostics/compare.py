"""Turbo Compare: how far two runs are apart, how much of dense attention a block map keeps; as heat maps, as text."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from ..sla import block_map, covering_map
from .charts import Panel, heat_map, sheet

TOPKS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)  # what a comparison tells about beside the settings in use
_GAP = "   "  # between the columns of the table


def sample_tokens(length: int, count: int, device="cpu", seed: int = 0):
    """Ascending indices of `count` of `length` tokens, the same in every call; all of them where there are fewer."""
    if count >= length:
        return torch.arange(length, device=device)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(length, generator=generator)[:count].sort().values.to(device)


def squared_norms(ours, theirs):
    """float64 [2]: squared norm of ours - theirs, and of theirs. Add those of several parts, then error_of."""
    theirs = theirs.to(ours.device).float()
    return torch.stack([((ours.float() - theirs) ** 2).sum(), (theirs**2).sum()]).double().cpu()


def error_of(norms) -> float:
    """Relative error |ours - theirs| / |theirs| from squared_norms; 0 where both are zero."""
    difference, reference = norms.tolist()
    return 0.0 if difference == 0 else (difference / reference) ** 0.5 if reference else float("inf")


def key_block_mass(q, k, rows, block_k: int = 64):
    """How dense softmax attention of some query rows spreads over the key blocks.

    q, k: [B, L, H, D] after norm and RoPE; rows: [R] token indices. Returns float32 [B, H, R, ceil(L / block_k)],
    which sums to 1 over the blocks. Holds the R x L scores of one head at a time, never L x L.
    """
    length, d = k.shape[1], k.shape[-1]
    mass = []
    for head in range(k.shape[2]):
        scores = q[:, rows, head].float() @ k[:, :, head].float().transpose(-1, -2) * d**-0.5
        shares = F.pad(scores.softmax(-1), (0, -length % block_k))
        mass.append(shares.unflatten(-1, (-1, block_k)).sum(-1))
    return torch.stack(mass, 1)


def kept_share(mass, index, rows, block_q: int = 128, counts=None):
    """Share of the mass that lies in the kept blocks.

    mass: [B, H, R, key blocks] as from key_block_mass; index: int [B, H, query blocks, kept] as from block_map;
    rows: [R], the token index of each row; counts: int [B, H, query blocks] as from covering_map, or None.
    Returns float32 [B, H, R], 0 to 1.
    """
    kept = mass.gather(-1, index[:, :, rows // block_q].long())
    if counts is not None:
        there = torch.arange(kept.shape[-1], device=kept.device) < counts[:, :, rows // block_q, None]
        kept = kept.masked_fill(~there, 0.0)
    return kept.sum(-1)


def attention_recall(q, k, index, rows=None, block_q: int = 128, block_k: int = 64):
    """Share of the dense attention mass that the kept key blocks carry.

    q, k: [B, L, H, D] after norm and RoPE; index: int [B, H, query blocks, kept] as from block_map; rows: [R] token
    indices, 128 sampled ones by default. Returns float32 [B, H, R]; 1 means that nothing is lost.
    """
    rows = sample_tokens(q.shape[1], 128, q.device) if rows is None else rows
    return kept_share(key_block_mass(q, k, rows, block_k), index, rows, block_q)


def recall_by_topk(q, k, topks=TOPKS, rows=None, block_q: int = 128, block_k: int = 64, coverage=None):
    """attention_recall for each top-k, the attention itself computed once.

    coverage: puts blocks by cumulative score in the place of the first top-k. Returns float32 [len(topks), B, H, R].
    """
    rows = sample_tokens(q.shape[1], 128, q.device) if rows is None else rows
    mass, blocks = key_block_mass(q, k, rows, block_k), (block_q, block_k)
    shares = []
    if coverage is not None:
        index, counts = covering_map(q, k, coverage, *blocks)
        shares, topks = [kept_share(mass, index, rows, block_q, counts)], topks[1:]
    shares += [kept_share(mass, block_map(q, k, topk, *blocks), rows, block_q) for topk in topks]
    return torch.stack(shares)


def picture(title, head, sigmas, errors, denoised, recall) -> np.ndarray:
    """The heat maps of a comparison below a title and the lines of head: uint8 [height, width, 3]; the other arguments
    as in panels. Raises TurboError without Pillow."""
    maps = [heat_map(panel) for panel in panels(sigmas, errors, denoised, recall)]
    return np.array(sheet(title, head, maps))


def panels(sigmas, errors, denoised, recall) -> list[Panel]:
    """Heat maps of a comparison.

    sigmas: [steps + 1]. errors: [steps][blocks] relative errors of the block outputs. denoised: [steps] relative
    errors of x0. recall: float [steps, blocks, 1 + len(TOPKS), 2], mean and least head, for the settings in use and
    for each of TOPKS. nan where nothing was seen. Without any recall there is the map of errors alone.
    """
    steps, blocks = recall.shape[:2]
    by_step = {
        "rows": [f"{i + 1}  ({sigmas[i]:.3f})" for i in range(steps)],
        "row_name": "step (sigma)",
        "columns": [str(b) for b in range(blocks)],
        "column_name": "block",
    }
    by_topk = {**by_step, "rows": [f"{topk:g}" for topk in TOPKS], "row_name": "top-k"}
    rows = [[*row, last] for row, last in zip(errors, denoised)]
    found = [Panel("Error of block outputs and of the video x0, %", "error", summary="x0", values=rows, **by_step)]
    mean = recall[..., 0]
    if not mean.isnan().all():
        title = "Share of dense attention that B keeps, %"
        rows = [_row_with_mean(row) for row in mean[:, :, 0]]
        found.append(Panel(title, "recall", summary="mean", values=rows, **by_step))
        title = "Share that other top-k would keep, %, mean of all steps"
        rows = [_row_with_mean(row) for row in mean[:, :, 1:].nanmean(0).t()]
        found.append(Panel(title, "recall", summary="mean", values=rows, **by_topk))
    return found


def _row_with_mean(row):
    return row.tolist() + [row.nanmean().item()]


def table(head, sigmas, errors, denoised, recall) -> str:
    """The figures as text, below the lines of head; arguments as in panels."""
    mean, least_head = recall.unbind(-1)
    parts = [head, _by_step(sigmas, errors, denoised, mean[..., 0], least_head[..., 0])]
    if mean[..., 0].isnan().all():
        parts.append(["B's self-attention could not be seen: another node has taken its place."])
    else:
        parts += [*_by_topk(mean.nanmean(0)), _by_block(errors, mean[..., 0])]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _by_step(sigmas, errors, denoised, kept, least_head):
    lines = ["step   sigma       x0   block 0   middle     last" + _GAP + "kept: mean  least head"]
    for i, row in enumerate(errors):
        cells = [denoised[i], row[0], row[len(row) // 2], row[-1]]
        shares = _percent(kept[i].nanmean().item(), 10) + _percent(_least(least_head[i])[1], 12)
        lines.append(f"{i + 1:4}{sigmas[i]:8.4f}" + "".join(map(_percent, cells)) + _GAP + shares)
    return lines


def _by_topk(kept):
    """What each top-k keeps, and where the settings in use keep least; kept: [blocks, 1 + len(TOPKS)]."""
    lines = ["top-k" + _GAP + "kept: mean  least block"]
    for topk, shares in zip(TOPKS, kept.t()[1:]):
        block, share = _least(shares)
        lines.append(f"{topk:5g}{_GAP}{_percent(shares.nanmean().item(), 10)}{_percent(share, 13)} (block {block})")
    own = kept[:, 0]
    if not bool((own < 0.9999).any()):
        return [lines]
    worst = own.nan_to_num(torch.inf).argsort()[: max(1, len(own) // 8)].sort().values.tolist()
    return [lines, [f"B keeps least in blocks {', '.join(map(str, worst))}: candidates for dense_blocks."]]


def _by_block(errors, kept):
    width = max(9 * len(errors), 20)
    lines = [f"block  {'error at each step':<{width}}{_GAP}kept at each step"]
    for block, shares in enumerate(kept.t().tolist()):
        found = "".join(_percent(row[block]) for row in errors)
        lines.append(f"{block:5}{found:<{width}}{_GAP}" + "".join(map(_percent, shares)))
    return lines


def _percent(value, width=9):
    """Right-aligned, of that width with the blank and sign: "  12.34 %"."""
    return f"{'-':>{width}}" if math.isnan(value) else f"{100 * value:{width - 2}.2f} %"


def _least(shares):
    """(index, value) of the smallest that is not nan; (0, nan) where all are."""
    index = int(shares.nan_to_num(torch.inf).argmin())
    return index, shares[index].item()
