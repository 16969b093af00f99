"""What a VAE that sees a video piece by piece keeps of the pieces before: the last frames that each layer saw."""

import torch


class Past:
    """The frames before a piece, by layer; none before a video's first frame, which is always a piece of its own.

    With it any cut of a video gives the numbers of the whole. Tensors are replaced, never written to, so that a copy
    is a place to go back to.
    """

    def __init__(self, frames=None, first=True, rows=None):
        self.first = first  # whether the piece at work begins the video
        self.rows = rows  # turbo_core.parallel.Rows where several processes hold rows of each frame
        self._frames = dict(frames or {})

    def copy(self) -> "Past":
        return Past(self._frames, self.first, self.rows)

    def before(self, layer):
        """The frames [B, C, n, ...] that the layer saw last, None before its first."""
        return self._frames.get(layer)

    def keep(self, layer, x: torch.Tensor, count: int) -> None:
        """Remember the last `count` frames of what the layer has just seen."""
        self._frames[layer] = x[:, :, -count:].clone()  # a view would hold all of x

    def room(self, layer, x: torch.Tensor, count: int):
        """(a tensor that begins with the `count` frames before x, zeros where there was none; its part for x itself).

        A lone first frame gets no frames before it: a convolution leaves out what would meet zeros.
        """
        seen = self.before(layer)
        if seen is None and x.shape[2] == 1:
            count = 0
        b, c, t, h, w = x.shape
        whole = torch.empty((b, c, count + t, h, w), dtype=x.dtype, device=x.device, memory_format=_layout(x))
        known = 0 if seen is None else seen.shape[2]
        whole[:, :, : count - known] = 0
        if known:
            whole[:, :, count - known : count] = seen
        return whole, whole[:, :, count:]


def _layout(x):
    packed = x.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if packed else torch.contiguous_format
