"""Wan 2.2 A14B's two transformers as one network, so that every stage trains them as it trains a single one."""

import torch
import torch.distributed as dist

from ..wan import WanModel

BOUNDARY = 0.9  # of the published image-to-video experts, in times of 0 to 1


class Experts(torch.nn.Module):
    """high sees the clips at times from the boundary on, low the others; a batch may hold both.

    A call is like one of WanModel, with a context_bias. Where several processes train, each expert always sees at
    least one clip, whose velocity counts for nothing where it is the other's: they wait for each other's gradients, or
    shards, in every block.
    """

    def __init__(self, high: WanModel, low: WanModel, boundary: float = BOUNDARY):
        super().__init__()
        self.high, self.low, self.boundary = high, low, boundary

    @property
    def parts(self) -> list[WanModel]:
        return [self.high, self.low]

    @property
    def in_dim(self) -> int:
        return self.high.in_dim

    @property
    def blocks(self) -> list:
        return [*self.high.blocks, *self.low.blocks]

    def forward(self, x, timestep, context, context_bias, y=None, **options):
        early = timestep >= 1000 * self.boundary
        velocity = torch.zeros_like(x)
        for model, mine in zip(self.parts, (early, ~early)):
            rows = mine.nonzero()[:, 0]
            if not len(rows) and not dist.is_initialized():
                continue
            rows = rows if len(rows) else mine.new_zeros(1, dtype=torch.long)
            image = None if y is None else y[rows]
            part = model(x[rows], timestep[rows], context[rows], context_bias=context_bias[rows], y=image, **options)
            velocity = velocity.index_add(0, rows, part * mine[rows].view(-1, 1, 1, 1, 1))
        return velocity
