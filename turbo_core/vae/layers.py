"""The layers of the Wan 2.1 VAE, under their official names. They see a video piece by piece, see past.py.

Activations are [B, C, T, H, W]; at inference the channels lie innermost in memory (channels_last_3d): convolutions are
fastest so, and a norm over channels reads memory in order.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..channels import norm_silu, rms_norm
from .ops import conv
from .past import Past

FRAMES_AT_ONCE = 2  # resampled together: twice the side is four times the memory


class Norm(nn.Module):
    """The factors of an RMSNorm over channels, in the published shape [C, 1, 1, ...]."""

    def __init__(self, dim, axes):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))


class _Unset:
    """Without first weights on the meta device: drawing them there takes torch's compiler in, which is seconds."""

    def reset_parameters(self):
        if not self.weight.is_meta:
            super().reset_parameters()


class Conv2d(_Unset, nn.Conv2d):
    pass


class Conv3d(_Unset, nn.Conv3d):
    pass


class CausalConv(Conv3d):
    """A convolution over time and space that sees the frames before a piece and no future."""

    def forward(self, x, past: Past):
        whole, own = self.room(x, past)
        own.copy_(x)
        return self.over(whole, past)

    def room(self, x, past: Past):
        """(a tensor with the frames before x, to be filled with what is convolved; its part for x)."""
        return past.room(self, x, self.kernel_size[0] - 1)

    def over(self, filled, past: Past):
        """The convolution of a tensor of `room`."""
        frames, height, width = self.kernel_size
        past.keep(self, filled, frames - 1)
        weight, above = self.weight[:, :, -1:] if filled.shape[2] == 1 else self.weight, height // 2
        if above and past.rows is not None:
            filled, above = past.rows.edges(filled), 0
        return conv(filled, weight, self.bias, padding=(0, above, width // 2))


class Pointwise(Conv3d):
    """A product over channels alone, stored as a convolution of 1x1x1."""

    def forward(self, x):
        return conv(x, self.weight, self.bias)


def activated(x, norm: Norm, layer: CausalConv, past: Past):
    """SiLU(RMSNorm(x)) where `layer` takes it."""
    filled, own = layer.room(x, past)
    norm_silu(x, norm.gamma, own)
    return filled


class Residual(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.residual = nn.Sequential(
            Norm(dim, 3), nn.SiLU(), CausalConv(dim, out, 3),
            Norm(out, 3), nn.SiLU(), nn.Identity(), CausalConv(out, out, 3),
        )  # fmt: skip
        self.shortcut = Pointwise(dim, out, 1) if dim != out else nn.Identity()

    def forward(self, x, past: Past):
        first_norm, _, first, second_norm, _, _, second = self.residual
        # one name for all: each is freed before the next convolution, the largest moment of all
        y = activated(x, first_norm, first, past)
        y = first.over(y, past)
        y = activated(y, second_norm, second, past)
        y = second.over(y, past)
        return added(y, self.shortcut(x))


def added(y, x):
    """y + x, in the memory of y where nobody needs it any more."""
    return y + x if torch.is_grad_enabled() else y.add_(x)


class Attention(nn.Module):
    """Self-attention within each frame, one head."""

    def __init__(self, dim):
        super().__init__()
        self.norm = Norm(dim, 2)
        self.to_qkv = Conv2d(dim, dim * 3, 1)
        self.proj = Conv2d(dim, dim, 1)

    def forward(self, x, past: Past):
        b, c, t, h, w = x.shape
        tokens = rms_norm(x, self.norm.gamma).permute(0, 2, 3, 4, 1).reshape(b * t, h * w, c)
        q, k, v = F.linear(tokens, self.to_qkv.weight.view(3 * c, c), self.to_qkv.bias)[:, None].chunk(3, -1)
        if past.rows is not None:
            k, v = (past.rows.tokens(some[:, 0])[:, None] for some in (k, v))
        out = F.scaled_dot_product_attention(q, k, v)[:, 0]
        out = F.linear(out, self.proj.weight.view(c, c), self.proj.bias)
        return out.view(b, t, h, w, c).permute(0, 4, 1, 2, 3) + x


class Downsample(nn.Module):
    """Halves space, and time where asked: the first frame alone, then every two frames become one."""

    def __init__(self, dim, in_time):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), Conv2d(dim, dim, 3, 2))
        self.time_conv = Conv3d(dim, dim, (3, 1, 1), (2, 1, 1)) if in_time else None

    def forward(self, x, past: Past):
        pad, in_space = self.resample
        frames = x.transpose(1, 2).flatten(0, 1).split(FRAMES_AT_ONCE)
        parts = [conv(pad(some), in_space.weight, in_space.bias, 2) for some in frames]
        x = torch.cat(parts).unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        layer = self.time_conv
        if layer is None:
            return x
        if past.first:
            past.keep(layer, x, 1)
            return x
        filled, own = past.room(layer, x, 1)
        own.copy_(x)
        past.keep(layer, filled, 1)
        return conv(filled, layer.weight, layer.bias, layer.stride)


class Upsample(nn.Module):
    """Doubles space, and time where asked: the first frame stays one, every later frame becomes two."""

    def __init__(self, dim, in_time):
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), Conv2d(dim, dim // 2, 3, padding=1))
        self.time_conv = CausalConv(dim, dim * 2, (3, 1, 1)) if in_time else None

    def forward(self, x, past: Past):
        times = 1 if self.time_conv is None or past.first else 2
        if times == 2:
            x = self.time_conv(x, past)
        return doubled(x, self.resample[1], times, past)


def doubled(x, layer, times: int, past: Past):
    """A convolution of 3x3 over frames of twice the side; `times` frames lie in the channels of one."""
    b, c, _, h, w = x.shape
    c, parts, above = c // times, [], 1
    if past.rows is not None:
        x, h, above = past.rows.edges(x), h + 2, 0
    for some in x.permute(0, 2, 3, 4, 1).reshape(-1, h, 1, w, 1, times, c).split(FRAMES_AT_ONCE // times):
        large = some.new_empty(len(some), times, h, 2, w, 2, c)
        large.copy_(some.permute(0, 5, 1, 2, 3, 4, 6))  # of a pair each frame, of a frame each pixel four times
        frames = large.view(-1, 2 * h, 2 * w, c)
        frames = (frames if above else frames[:, 1:-1]).permute(0, 3, 1, 2)  # of two rows more one is asked for
        parts.append(conv(frames, layer.weight, layer.bias, padding=(above, 1)))
    return torch.cat(parts).unflatten(0, (b, -1)).transpose(1, 2)
