"""One clip's tokens over several processes: whole blocks of 128 tokens each, whole heads around self-attention.

All but self-attention works on tokens by themselves, or on blocks of 128 that share an int8 scale, so a process that
holds whole blocks of them computes what one process computes. Around self-attention an all-to-all turns some tokens
of all heads into all tokens of some heads: block map, linear branch and the scales of low-bit attention see what they
see in one process. Source: DeepSpeed Ulysses, arXiv 2309.14509.
"""

import torch
import torch.distributed as dist

from ..errors import TurboError
from ..int8 import BLOCK


class Sequence:
    """A group of processes that compute one clip together; the value of WanModel.sequence."""

    def __init__(self, group=None):
        """group: of torch.distributed, default all processes."""
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def check(self, num_heads: int, length: int) -> None:
        """Raise TurboError unless a model of so many heads and a clip of so many tokens divide among the processes."""
        if num_heads % self.size:
            counts = [str(n) for n in range(2, num_heads + 1) if num_heads % n == 0]
            some = f"{', '.join(counts[:-1])} or {counts[-1]}" if len(counts) > 1 else counts[0] if counts else "1"
            raise TurboError(
                f"{num_heads} heads do not divide among {self.size} processes: start {some} (--nproc-per-node)."
            )
        blocks = -(-length // BLOCK)
        if blocks < self.size:
            raise TurboError(
                f"A clip of {length} tokens has fewer blocks of {BLOCK} ({blocks}) than {self.size} processes: start "
                "fewer (--nproc-per-node), or make it larger or longer."
            )

    def over(self, batch: int, length: int, num_heads: int) -> "Shards":
        """How the tokens of one forward, [batch, length, ...], lie in the processes. Raises TurboError, see check."""
        self.check(num_heads, length)
        if batch > 1 and length % BLOCK:
            raise TurboError(
                f"Several samples of {length} tokens, no multiple of {BLOCK}, share int8 blocks, which several "
                "processes cannot hold: give one sample at a time."
            )
        return Shards(self, length)


class Shards:
    """The tokens of one forward in their processes: blocks in order, their counts differ by one at most."""

    def __init__(self, sequence: Sequence, length: int):
        self.group, self.rank, self.size = sequence.group, sequence.rank, sequence.size
        blocks = -(-length // BLOCK)
        ends = [min(length, BLOCK * -(-blocks * (i + 1) // self.size)) for i in range(self.size)]
        self.counts = [end - start for start, end in zip([0, *ends], ends)]
        self.length = length
        self.own = slice(ends[self.rank] - self.counts[self.rank], ends[self.rank])

    def heads(self, num_heads: int) -> slice:
        """The heads that this process attends with."""
        own = num_heads // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def to_heads(self, *parts):
        """Own tokens of all heads -> all tokens of own heads: tensors [B, own, H, D] -> [n, B, L, H / size, D].

        parts: n tensors, q, k and v, which travel together; or one that holds them, [n, B, own, H, D].
        """
        first = parts[0]
        given = first if first.ndim == 5 else None
        n = len(parts) if given is None else len(given)
        b, own, h, d = first.shape[-4:]
        sent = first.new_empty(self.size, own, n, b, h // self.size, d)
        for i, x in enumerate(parts if given is None else given):
            sent[:, :, i] = x.view(b, own, self.size, -1, d).permute(2, 1, 0, 3, 4)
        received = first.new_empty(self.length, *sent.shape[2:])
        self._exchange(received, sent.flatten(0, 1), self.counts, [own] * self.size)
        return received.permute(1, 2, 0, 3, 4)

    def raw_to_heads(self, qkv, sums, norm_q, norm_k):
        """The same of what sla_from_qkv takes, whose norm is over all heads: (qkv, sums, norm_q, norm_k) of own heads.

        qkv: [3, B, own, H, D]; sums: float32 [2, P, B * own]; norm_q, norm_k: [H * D]. A norm of H / size heads takes a
        part of the sum of all; where size is a power of two, its quotient has the same bits.
        """
        b, own, h, d = qkv.shape[1:]
        columns = slice(self.heads(h).start * d, self.heads(h).stop * d)
        whole = torch.stack([x.sum(0) for x in sums]).view(2, b, own) / self.size
        sums = self.whole(whole.permute(1, 2, 0)).permute(2, 0, 1).reshape(2, 1, -1)
        return self.to_heads(qkv), sums, norm_q[columns], norm_k[columns]

    def to_tokens(self, x):
        """All tokens of own heads -> own tokens of all heads: [B, L, C] -> [B, own, C * size]."""
        return self._rows(x, self.counts)

    def to_tokens_int8(self, q, scale):
        """The same of what quantize_block returns, one block of columns a head: (int8 [B * L, C], float32 scale)."""
        batch = len(q) // self.length
        blocks = [-(-count // BLOCK) for count in self.counts]
        q = self._rows(q.view(batch, self.length, -1), self.counts)
        scale = self._rows(scale.view(batch, sum(blocks), -1), blocks)
        return q.flatten(0, 1), scale.flatten(0, 1)

    def _rows(self, x, counts):
        """Rows x [B, sum(counts), C] of own columns -> own rows of all columns, [B, counts[rank], C * size]."""
        b, _, c = x.shape
        own = counts[self.rank]
        received = x.new_empty(self.size, own, b, c)
        self._exchange(received.flatten(0, 1), x.transpose(0, 1).contiguous(), [own] * self.size, counts)
        return received.permute(2, 1, 0, 3).reshape(b, own, -1)

    def whole(self, x):
        """Own tokens -> all tokens, in every process: [B, own, C] -> [B, L, C]."""
        return gathered(x, self.counts, self.rank, self.group)

    def _exchange(self, received, sent, receive_counts, send_counts):
        exchange(received, sent, receive_counts, send_counts, self.group)


def gathered(x, counts, rank: int, group):
    """Own rows -> all rows, in every process: [B, counts[rank], C] -> [B, sum(counts), C]."""
    b, own, c = x.shape
    sent = x.transpose(0, 1).contiguous().expand(len(counts), -1, -1, -1).flatten(0, 1)
    received = x.new_empty(sum(counts), b, c)
    exchange(received, sent, counts, [own] * len(counts), group)
    return received.transpose(0, 1)


def exchange(received, sent, receive_counts, send_counts, group):
    """All-to-all of rows of contiguous tensors, as bytes: not every backend knows every dtype."""
    received, sent = (t.flatten(1).view(torch.uint8) for t in (received, sent))
    dist.all_to_all_single(received, sent, receive_counts, send_counts, group=group)
