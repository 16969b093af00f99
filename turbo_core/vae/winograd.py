"""Convolutions of 3x3x3 on a CPU by two thirds of the products: Winograd's F(2, 3) along the width, in float32.

Two neighbouring outputs take four products where a plain convolution takes six. Each of the four is a convolution of
3x3x1 over half the width, which oneDNN computes. Source: Lavin, Gray, https://arxiv.org/abs/1509.09308.
"""

import torch

CHANNELS, PIXELS = 64, 8192  # below, the sums around the products cost more than the products that are saved
_SLAB = 2**23  # bytes of transformed input that are held at a time


def pays(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a convolution of [B, C, T + 2, H, W] is wide and large enough, of 3x3x3, and has an even width."""
    if x.ndim != 5 or tuple(weight.shape[2:]) != (3, 3, 3) or min(weight.shape[:2]) < CHANNELS or x.shape[4] % 2:
        return False
    return x[:, 0].numel() >= PIXELS and x.is_contiguous(memory_format=torch.channels_last_3d)


def conv(x, weight, bias, above=1):
    """The convolution of x [B, C, T + 2, H, W], channels innermost in memory, by [N, C, 3, 3, 3]: [B, N, T, H, W], with
    zeros around each frame and none in time. above 0: H - 2 rows, of an x that has its neighbours above and below."""
    b, c, frames, height, width = x.shape
    first, middle, last = weight.unbind(4)
    kernels = [first, (first + middle + last) / 2, (first - middle + last) / 2, last]
    kernels = [kernel.unsqueeze(4) for kernel in kernels]
    rows = min(height, max(8, _SLAB // (8 * b * c * frames * width)))
    first_row, last_row = 1 - above, height - 1 + above
    out = torch.empty(
        (b, weight.shape[0], frames - 2, last_row - first_row, width),
        dtype=x.dtype,
        memory_format=torch.channels_last_3d,
    )
    pairs = x.permute(0, 2, 3, 4, 1).unflatten(3, (-1, 2))
    even, odd = pairs[..., 0, :], pairs[..., 1, :]
    room = even.new_empty(4, b, frames, rows + 2, width // 2, c)  # for all slabs: new memory costs as much as the sums
    for start in range(first_row, last_row, rows):
        stop = min(start + rows, last_row)
        parts = _transformed(even, odd, start, stop, room[:, :, :, : stop - start + 2])
        shifts = None, bias, None, None  # the second product is in both outputs
        found = [_product(*given) for given in zip(parts, kernels, shifts)]
        places = out[:, :, :, start - first_row : stop - first_row].permute(0, 2, 3, 4, 1).unflatten(3, (-1, 2))
        torch.add(found[1], found[2], out=places[..., 0, :]).add_(found[0])
        torch.sub(found[1], found[2], out=places[..., 1, :]).sub_(found[3])
    return out


def _transformed(even, odd, start, stop, parts):
    """The four inputs of the products for these rows, with the rows around them: [4, B, T + 2, rows + 2, W / 2, C]."""
    height = even.shape[2]
    top, bottom = max(start - 1, 0), min(stop + 1, height)
    if start == 0:
        parts[:, :, :, 0] = 0
    if stop == height:
        parts[:, :, :, -1] = 0
    inner = parts[:, :, :, top - start + 1 : bottom - start + 1]
    even, odd = even[:, :, top:bottom], odd[:, :, top:bottom]
    torch.sub(odd[..., :-1, :], odd[..., 1:, :], out=inner[0][..., 1:, :])
    torch.neg(odd[..., :1, :], out=inner[0][..., :1, :])  # left of the picture there are zeros, and right of it
    torch.add(even, odd, out=inner[1])
    torch.sub(odd, even, out=inner[2])
    torch.sub(even[..., :-1, :], even[..., 1:, :], out=inner[3][..., :-1, :])
    inner[3][..., -1:, :] = even[..., -1:, :]
    return parts


def _product(part, kernel, bias):
    y = torch.mkldnn_convolution(part.permute(0, 4, 1, 2, 3), kernel, bias, (0, 0, 0), (1, 1, 1), (1, 1, 1), 1)
    return y.permute(0, 2, 3, 4, 1)
