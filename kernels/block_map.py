"""The block map of sparse attention: for each query block the key blocks of the highest score, ascending."""

import torch
import triton
import triton.language as tl

from .launch import run

SCRATCH = 1 << 26  # bytes of scores held at a time: two passes, four launches, for the 14B model at 720p
MOST_BLOCKS = 1 << 13  # of keys, half a million tokens: a row of scores lives in the registers of one program
_LEAST = tl.constexpr(-(2**31))


@triton.jit
def _score_kernel(
    q_ptr,  # [B * H, queries, D]
    k_ptr,  # [B * H, keys, D]
    k_mean_ptr,  # [B * H, D] or None
    rank_ptr,  # [tiles, 64, keys] int32
    first,  # tile of this launch's first one
    queries,
    keys,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # one program owns the scores of 64 query blocks and 64 key blocks of one head, as int32 in the order of the scores
    tiles = tl.cdiv(queries, 64)
    head = ((first + tl.program_id(1)) // tiles).to(tl.int64)
    rows = (first + tl.program_id(1)) % tiles * 64 + tl.arange(0, 64)
    cols = tl.program_id(0) * 64 + tl.arange(0, 64)
    score = tl.zeros((64, 64), tl.float32)
    for start in range(0, D, 32):
        d = start + tl.arange(0, 32)
        q = tl.load(q_ptr + (head * queries + rows)[:, None] * D + d[None, :], (rows < queries)[:, None], other=0.0)
        k = tl.load(k_ptr + (head * keys + cols)[:, None] * D + d[None, :], (cols < keys)[:, None], other=0.0)
        k = tl.where(tl.abs(k) < float("inf"), k, float("nan"))
        if k_mean_ptr is not None:  # the same number off a whole row of scores: it keeps the digits of what is left
            k -= tl.load(k_mean_ptr + head * D + d)[None, :]
        score = tl.dot(q, tl.trans(k), score, input_precision=PRECISION)
    score = tl.where(score == score, score, float("-inf"))  # a broken block is no one's best
    score = tl.where(score == 0, 0.0, score)  # the two zeros are one score
    bits = score.to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    at = (tl.program_id(1).to(tl.int64) * 64 + tl.arange(0, 64))[:, None] * keys + cols[None, :]
    tl.store(rank_ptr + at, rank, (cols < keys)[None, :])


@triton.jit
def _select_kernel(
    rank_ptr,  # [tiles, 64, keys] int32
    index_ptr,  # [B * H, queries, kept] int32
    first,
    queries,
    keys,
    kept,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # one program owns ROWS query blocks of one head: it finds each row's kept-th largest number bit by bit, by counting
    tiles = tl.cdiv(queries, 64)
    local = tl.program_id(0) * ROWS  # of the rows in this launch
    head = ((first + local // 64) // tiles).to(tl.int64)
    row = (first + local // 64) % tiles * 64 + local % 64
    if row >= queries:
        return
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    there = row + rows < queries
    rank = tl.load(rank_ptr + (local.to(tl.int64) + rows) * keys + cols, cols < keys, other=_LEAST)
    count = tl.sum((rank >= 0).to(tl.int32), 1)[:, None]
    threshold = tl.where(count >= kept, 0, _LEAST)
    count = tl.where(count >= kept, count, WIDTH)  # how many reach the threshold
    bit = tl.full((), 1 << 30, tl.int32)
    while (bit != 0) & (tl.max((there & (count != kept)).to(tl.int32)) > 0):
        reach = tl.sum((rank >= (threshold | bit)).to(tl.int32), 1)[:, None]
        threshold = tl.where(reach >= kept, threshold | bit, threshold)
        count = tl.where(reach >= kept, reach, count)
        bit = bit >> 1
    above, ties = rank > threshold, rank == threshold
    # two running counts in one number: of those above the threshold, and from bit 16 on of those at it
    running = tl.cumsum(above.to(tl.int32) + (ties.to(tl.int32) << 16), 1)
    spare = kept - tl.sum(above.to(tl.int32), 1)[:, None]
    taken = there & (above | (ties & ((running >> 16) <= spare)))
    place = (running & 0xFFFF) + tl.minimum(running >> 16, spare) - 1
    tl.store(index_ptr + (head * queries + row + rows) * kept + place, cols, taken)


def block_map(pooled_q, pooled_k, kept: int, k_mean=None):
    """The `kept` key blocks of the highest score pooled_q . (pooled_k - k_mean) for each query block.

    pooled_q: float32 [B, H, q blocks, D]; pooled_k: float32 [B, H, k blocks, D], D 64 or 128, up to 8192 key blocks;
    k_mean: float32 [B, H, D], which changes rounding alone. Ties go to the lower index; a NaN ranks lowest.
    Returns int32 [B, H, q blocks, kept], ascending. Beside it 64 MiB of scores at most exist at a time (one tile of 64
    query blocks where that is more). Raises ValueError.
    """
    b, h, queries, d = pooled_q.shape
    keys = pooled_k.shape[2]
    for name, x, shape in (("pooled_q", pooled_q, (b, h, queries, d)), ("pooled_k", pooled_k, (b, h, keys, d))) + (
        () if k_mean is None else (("k_mean", k_mean, (b, h, d)),)
    ):
        if x.shape != shape or x.dtype != torch.float32 or not x.is_contiguous() or x.device != pooled_q.device:
            raise ValueError(f"{name} must be contiguous float32 {list(shape)}, got {list(x.shape)} {x.dtype}")
    if d not in (64, 128) or 0 in pooled_q.shape or not 1 <= kept <= keys <= MOST_BLOCKS:
        raise ValueError(f"cannot keep {kept} of {keys} key blocks for queries {list(pooled_q.shape)}")
    index = torch.empty(b, h, queries, kept, dtype=torch.int32, device=pooled_q.device)
    tiles = b * h * triton.cdiv(queries, 64)
    step = min(tiles, max(1, SCRATCH // (64 * keys * 4)), 65535)  # a grid takes no more in its second dimension
    rank = torch.empty(step, 64, keys, dtype=torch.int32, device=pooled_q.device)
    precision = "ieee" if torch.version.hip else "tf32x3"
    scoring = {"D": d, "PRECISION": precision, "num_warps": 4, "num_stages": 1}
    width = max(16, triton.next_power_of_2(keys))
    rows = max(1, min(64, 2048 // width))
    selecting = {"ROWS": rows, "WIDTH": width, "num_warps": max(1, min(16, rows * width // 512))}
    for first in range(0, tiles, step):
        now = min(step, tiles - first)
        run(
            _score_kernel,
            (triton.cdiv(keys, 64), now),
            (pooled_q, pooled_k, k_mean, rank, first, queries, keys),
            scoring,
        )
        run(_select_kernel, (now * 64 // rows,), (rank, index, first, queries, keys, kept), selecting)
    return index
