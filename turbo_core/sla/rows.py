"""Attention over kept key blocks on a CPU: a query block at a time, whose keys stay in the cache, and nothing masked.

The keys of a head are laid out once in blocks; those of a query block are copied together, in ascending order, so that
a ragged last block ends what is copied and is cut off.
"""

import torch
import torch.nn.functional as F

from ..int8.products import Room, int_mm

FP8_MAX = 448.0
THREADS = 4  # that torch's attention gives one query block; more of them compute several at once


def lengths_of(index, counts, keys, block_k):
    """Key tokens of each row of index [..., kept], ascending: a list."""
    kept, blocks = index.shape[-1], -(-keys // block_k)
    count = torch.full(index.shape[:-1], kept) if counts is None else counts.reshape(index.shape[:-1]).long()
    last = index.gather(-1, count[..., None] - 1)[..., 0]
    return (count * block_k - (last == blocks - 1) * (blocks * block_k - keys)).flatten().tolist()


def attend(qb, kb, vb, index, lengths, scale):
    """Softmax attention. qb [heads, q blocks, block_q, d]; kb, vb [heads, k blocks, block_k, d]; index int64 [heads,
    q blocks, kept]; lengths: key tokens of each of its rows. Returns qb's shape."""
    out, size = torch.empty_like(qb), qb.shape[1]
    gather_k, gather_v = Gather(kb), Gather(vb)
    step = max(1, torch.get_num_threads() // THREADS)
    for head in range(len(qb)):
        for start in range(0, size, step):
            end = min(start + step, size)
            tokens = lengths[head * size + start : head * size + end]
            # rows that keep different numbers of keys would need a mask, and torch a slower way
            groups = [(start, end)] if len(set(tokens)) == 1 else [(i, i + 1) for i in range(start, end)]
            for first, last in groups:
                chosen, length = index[head, first:last], lengths[head * size + first]
                k, v = gather_k(head, chosen)[:, None, :length], gather_v(head, chosen)[:, None, :length]
                part = F.scaled_dot_product_attention(qb[head, first:last, None], k, v, scale=scale)
                out[head, first:last] = part[:, 0]
    return out


def attend_low_bit(q, q_scale, k, k_scale, vb, index, lengths, scale):
    """SageSLA's: q [heads, q blocks, block_q, d] and k in int8, with a scale for each block, [heads, blocks]; vb in
    float32. Returns float32 of q's shape."""
    out, size = torch.empty(q.shape), q.shape[1]
    gather_k, gather_v, block_k = Gather(k), Gather(vb), k.shape[2]
    k_scale, scores, bits = k_scale * scale, Room(), Room()
    for head in range(len(q)):
        for row in range(size):
            chosen, length = index[head, row], lengths[head * size + row]
            keys = gather_k(head, chosen[None])[0, :length]
            by_key = (k_scale[head, chosen] * q_scale[head, row]).repeat_interleave(block_k)[:length]
            p = int_mm(q[head, row], keys, scores).mul_(by_key)
            p.sub_(p.amax(-1, keepdim=True)).exp_()
            total = p.sum(-1, keepdim=True)
            torch.mm(fake_fp8(p, bits), gather_v(head, chosen[None])[0, :length], out=out[head, row])
            out[head, row].div_(total)
    return out


def fake_fp8(p, room):
    """Probabilities [M, N], 0 to 1, rounded to e4m3, scaled to its range, and back: p is overwritten."""
    found = room.take(*p.shape, p).view(torch.int32)
    found.copy_(p.div_(1 / FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8))
    # its exponent and mantissa are the number times 2^-120 in float32; torch's own way back takes ten times as long
    return found.mul_(1 << 20).view(torch.float32).mul_(2.0**120).mul_(1 / FP8_MAX)


class Gather:
    """Chosen blocks of [heads, blocks, block, d], one after another, in memory that is written again and again."""

    def __init__(self, x):
        self.x, self.shape, self.held = x.flatten(2), x.shape, None

    def __call__(self, head, chosen):
        """chosen [rows, kept] -> [rows, kept * block, d]."""
        rows, kept = chosen.shape
        _, _, block, d = self.shape
        if self.held is None or len(self.held) < rows * kept:
            self.held = self.x.new_empty(rows * kept, block * d)
        found = torch.index_select(self.x[head], 0, chosen.flatten(), out=self.held[: rows * kept])
        return found.view(rows, kept * block, d)
