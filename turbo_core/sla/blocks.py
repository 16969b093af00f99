"""Which key blocks a query block attends to: by top-k, or by cumulative score.

Both look at the product of pooled queries and pooled keys, one number per pair of blocks; blocks are 128 queries x 64
keys everywhere. Top-k is what the published models were trained with (SLA, arXiv 2509.24006); the cumulative score,
after SpargeAttn (arXiv 2502.18137), gives blocks to the rows that spread and takes them from those that do not.
"""

import contextlib

import torch

SLICE = 1 << 22  # scores held in float32 at a time
_UNITS = 1 << 30  # shares are counted in whole units: sums of integers are the same in any order


def in_blocks(x, block):
    """[B, L, H, D] -> [B * H, blocks, block, D], zero-padded."""
    b, length, h, d = x.shape
    blocks = x.new_empty(b, h, length + -length % block, d)  # padded and turned in one pass
    blocks[:, :, :length] = x.transpose(1, 2)
    blocks[:, :, length:] = 0
    return blocks.view(b * h, -1, block, d)


def nan_unless_finite(x):
    return x.masked_fill(~x.isfinite(), torch.nan)


def pool(x, block: int):
    """Mean of each block of tokens, over the tokens that are there.

    x: [B, L, H, D]. Returns float32 [B, H, ceil(L / block), D].
    """
    b, length, h, d = x.shape
    sums = in_blocks(x, block).sum(2, dtype=torch.float32)
    count = torch.full((sums.shape[1], 1), float(block), device=x.device)
    count[-1] = length - block * (sums.shape[1] - 1)
    return (sums / count).view(b, h, -1, d)


def kept_blocks(topk: float, blocks: int) -> int:
    """How many key blocks a top-k fraction keeps: the floor, as in the reference, but never none."""
    return min(blocks, max(1, int(topk * blocks)))


def as_written(device):
    """A context in which products of float32 stay in float32, whatever the caller's torch.autocast says."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


def _scores(pooled_q, pooled_k):
    # Any constant taken off all keys shifts a row of scores as a whole, so the mean is there for precision alone;
    # nanmean and the -inf keep one bad key block from deciding every row.
    pooled_k = nan_unless_finite(pooled_k)
    pooled_k = pooled_k - pooled_k.nanmean(2, keepdim=True)
    with as_written(pooled_q.device):
        score = pooled_q @ pooled_k.transpose(-1, -2)
    return score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def top_blocks(pooled_q, pooled_k, kept: int):
    """The `kept` key blocks of the highest score; ties go to the lower index.

    pooled_q: float32 [B, H, q blocks, D]; pooled_k: [B, H, k blocks, D]. Returns int32 [B, H, q blocks, kept],
    ascending.
    """
    best = _scores(pooled_q, pooled_k).sort(dim=-1, descending=True, stable=True).indices
    return best[..., :kept].sort(-1).values.to(torch.int32)


def top_map(q, k, topk: float, block_q: int = 128, block_k: int = 64):
    """top_blocks of q and k, [B, L, H, D], which keeps the fraction topk of the key blocks."""
    pooled_q, pooled_k = pool(q, block_q), pool(k, block_k)
    return top_blocks(pooled_q, pooled_k, kept_blocks(topk, pooled_k.shape[2]))


def covering_map(q, k, coverage: float, block_q: int = 128, block_k: int = 64):
    """covering_blocks of q and k, [B, L, H, D]; as many queries as keys are taken for the same tokens."""
    return covering_blocks(pool(q, block_q), pool(k, block_k), coverage, own_blocks(q, k, block_q, block_k))


def own_blocks(q, k, block_q: int = 128, block_k: int = 64) -> int:
    """How many key blocks hold the tokens of a query block; 0 where keys and queries are not the same tokens."""
    return block_q // block_k if q.shape[1] == k.shape[1] else 0


def covering_blocks(pooled_q, pooled_k, coverage: float, own: int = 0):
    """The fewest key blocks whose shares of softmax(score / sqrt(D)) add up to `coverage`, and always the row's own.

    pooled_q: float32 [B, H, q blocks, D]; pooled_k: [B, H, k blocks, D]; coverage above 0 and below 1. own: key blocks
    to a query block where both are the same tokens, else 0. A token's own neighbourhood is where a mean of 64 keys
    says least: a sharp head looks at single tokens there, which the mean has averaged away.
    Returns int32 (index [B, H, q blocks, most], counts [B, H, q blocks]): the first counts entries of a row are its
    blocks, ascending; the last of them is repeated behind. `most` is read from the device, which waits for it: once
    for each layer.
    """
    b, h, rows, d = pooled_q.shape
    blocks = pooled_k.shape[2]
    heads = max(1, SLICE // (b * rows * blocks))
    kept = torch.empty(b, h, rows, blocks, dtype=torch.bool, device=pooled_q.device)
    for part in (slice(start, start + heads) for start in range(0, h, heads)):
        kept[:, part] = _covering(_scores(pooled_q[:, part], pooled_k[:, part]) * d**-0.5, coverage)
    if own:
        row = torch.arange(rows, device=kept.device)[:, None]
        kept |= torch.arange(blocks, device=kept.device) // own == row
    counts = kept.sum(-1, dtype=torch.int32)
    index = torch.empty(b, h, rows, int(counts.max()), dtype=torch.int32, device=kept.device)
    place = torch.arange(index.shape[-1], device=kept.device)
    for part in (slice(start, start + heads) for start in range(0, h, heads)):
        ascending = kept[:, part].to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
        index[:, part] = ascending.gather(-1, place.minimum(counts[:, part, :, None] - 1))
    return index, counts


def _covering(score, coverage):
    """bool of score's shape [..., k blocks]: those that are needed, best first, until the coverage is reached."""
    score = score.clamp_max(torch.finfo(score.dtype).max)
    share = (score.softmax(-1).nan_to_num_(nan=0.0) * _UNITS).to(torch.int32)
    best = share.sort(dim=-1, descending=True, stable=True)
    before = best.values.cumsum(-1, dtype=torch.int32) - best.values
    needed = (before < coverage * _UNITS) & (best.values > 0)
    needed[..., 0] = True  # a row of no score at all keeps one, as with top-k
    return torch.zeros_like(needed).scatter_(-1, best.indices, needed)
