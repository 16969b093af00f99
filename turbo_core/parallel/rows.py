"""The rows of a video's frames over several processes, as the VAE decodes them together.

A convolution of 3x3 needs one row more above and below: the processes exchange their edges before each of them, so that
every pixel is computed once and from what one process computes it from.
"""

import torch

from .sequence import Sequence, exchange, gathered


class Rows:
    """Rows in order, at least one to a process; as tensors grow by a factor in height, so do their parts."""

    def __init__(self, sequence: Sequence, height: int):
        """height: rows of the latents, at least as many as processes."""
        self.group, self.rank, self.size = sequence.group, sequence.rank, sequence.size
        assert height >= self.size
        ends = [-(-height * (i + 1) // self.size) for i in range(self.size)]
        self.counts = [end - start for start, end in zip([0, *ends], ends)]
        self.own = slice(ends[self.rank] - self.counts[self.rank], ends[self.rank])

    def edges(self, x):
        """x [B, C, T, H, W] with one row of each neighbour above and below, zeros outside the video: H + 2 rows."""
        b, c, t, h, w = x.shape
        packed = x.is_contiguous(memory_format=torch.channels_last_3d)
        layout = torch.channels_last_3d if packed else torch.contiguous_format
        out = torch.empty((b, c, t, h + 2, w), dtype=x.dtype, device=x.device, memory_format=layout)
        out[..., 1:-1, :] = x
        ends = {self.rank - 1: x[..., 0, :], self.rank + 1: x[..., -1, :]}
        there = [rank for rank in ends if 0 <= rank < self.size]
        counts = [int(rank in there) for rank in range(self.size)]
        sent = torch.stack([ends[rank] for rank in there]).contiguous()
        received = sent.new_empty(sent.shape)
        exchange(received, sent, counts, counts, self.group)
        found = dict(zip(there, received))
        for place, rank in ((0, self.rank - 1), (-1, self.rank + 1)):
            out[..., place, :] = found.get(rank, 0)
        return out

    def tokens(self, x):
        """All pixels of latent frames in every process, of own ones: [N, own * W, C] -> [N, H * W, C]."""
        width = x.shape[1] // self.counts[self.rank]
        return gathered(x, [count * width for count in self.counts], self.rank, self.group)

    def to_first(self, frames):
        """All rows of finished frames in the first process, of own ones: [T, own, W, C] -> [T, H, W, C]; None in the
        others."""
        factor = frames.shape[1] // self.counts[self.rank]
        first = self.rank == 0
        counts = [count * factor if first else 0 for count in self.counts]
        received = frames.new_empty(sum(counts), len(frames), *frames.shape[2:])
        sent, shares = frames.transpose(0, 1).contiguous(), [frames.shape[1], *[0] * (self.size - 1)]
        exchange(received, sent, counts, shares, self.group)
        return received.transpose(0, 1) if first else None
