"""The rotary embedding of Wan: three axes share the channels of a head, neighbouring channels turn in pairs."""

import torch


def rope_angles(grid, head_dim: int, device=None, places=None):
    """Angles of the three-axis rotary embedding for a grid of (frames, height, width) patches.

    places: ([T], [H], [W]), where those patches lie in a larger grid, default 0 to T - 1 and so on. Returns float32
    [T * H * W, head_dim / 2]: channel pairs for time first, then height, then width, which get head_dim // 6 pairs
    each. Any grid size.
    """
    spatial = 2 * (head_dim // 6)
    places = [torch.arange(size) for size in grid] if places is None else [place.cpu() for place in places]
    axes = []
    for place, dim in zip(places, (head_dim - 2 * spatial, spatial, spatial)):
        frequency = 1.0 / 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        axes.append(torch.outer(place.double(), frequency).float().to(device))
    t, h, w = grid
    time, height, width = axes
    return torch.cat(
        [
            time[:, None, None].expand(t, h, w, -1),
            height[None, :, None].expand(t, h, w, -1),
            width[None, None].expand(t, h, w, -1),
        ],
        -1,
    ).reshape(t * h * w, -1)


def rotate(x, cos, sin):
    """Turn neighbouring channel pairs of x [..., D] by angles, given as cos and sin [..., D / 2]; in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
