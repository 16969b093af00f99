"""What a comparison of two models found, as heat maps and as a table of text."""

import math

import torch

from .compare import TOPKS
from .heatmap import Panel

_GAP = "   "


def _row_with_mean(row):
    return row.tolist() + [row.nanmean().item()]


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


def _percent(value, width=9):
    """Right-aligned, of that width with the blank and sign: "  12.34 %"."""
    return f"{'-':>{width}}" if math.isnan(value) else f"{100 * value:{width - 2}.2f} %"


def _least(shares):
    """(index, value) of the smallest that is not nan; (0, nan) where all are."""
    index = int(shares.nan_to_num(torch.inf).argmin())
    return index, shares[index].item()


def table(head, sigmas, errors, denoised, recall) -> str:
    """The same as text, below the lines of head; arguments as in panels."""
    steps, blocks = recall.shape[:2]
    own, least_head = recall[:, :, 0, 0], recall[:, :, 0, 1]
    lines = [*head, "", "step   sigma       x0   block 0   middle     last" + _GAP + "kept: mean  least head"]
    for i, row in enumerate(errors):
        cells = [denoised[i], row[0], row[blocks // 2], row[-1]]
        kept = _percent(own[i].nanmean().item(), 10) + _percent(_least(least_head[i])[1], 12)
        lines.append(f"{i + 1:4}{sigmas[i]:8.4f}" + "".join(map(_percent, cells)) + _GAP + kept)
    if own.isnan().all():
        return "\n".join([*lines, "", "B's self-attention could not be seen: another node has taken its place."])
    by_block = recall[..., 0].nanmean(0)  # [blocks, 1 + top-k]
    lines += ["", "top-k" + _GAP + "kept: mean  least block"]
    for topk, shares in zip(TOPKS, by_block.t()[1:]):
        block, share = _least(shares)
        lines.append(f"{topk:5g}{_GAP}{_percent(shares.nanmean().item(), 10)}{_percent(share, 13)} (block {block})")
    if bool((by_block[:, 0] < 0.9999).any()):
        worst = by_block[:, 0].nan_to_num(torch.inf).argsort()[: max(1, blocks // 8)].sort().values.tolist()
        lines += ["", f"B keeps least in blocks {', '.join(map(str, worst))}: candidates for dense_blocks."]
    lines += ["", f"block  {'error at each step':<{max(9 * steps, 20)}}{_GAP}kept at each step"]
    for b in range(blocks):
        error, kept = ("".join(map(_percent, cells)) for cells in ([row[b] for row in errors], own[:, b].tolist()))
        lines.append(f"{b:5}{error:<{max(9 * steps, 20)}}{_GAP}{kept}")
    return "\n".join(lines)
