"""The Wan 2.1 VAE as a network that can be trained: official names, whole clips at once, any base width.

The published code goes through a video in chunks of four frames and keeps the last two frames of every layer; over a
whole clip that is the same as padding each convolution with zeros in the past, which is what happens here.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..pipeline.vae import LATENT_CHANNELS


class Norm(nn.Module):
    """RMSNorm over the channels of [B, C, ...]."""

    def __init__(self, dim, axes):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))

    def forward(self, x):
        # channels lie innermost in memory, so that this moves nothing
        return F.rms_norm(x.movedim(1, -1), (x.shape[1],), self.gamma.to(x.dtype).view(-1), 1e-12).movedim(-1, 1)


class CausalConv(nn.Conv3d):
    """A convolution over time and space that sees no future."""

    def forward(self, x):
        kt, kh, kw = self.kernel_size
        weight = self.weight
        if x.shape[2] == 1:
            weight = weight[:, :, -1:]  # all the rest would meet zeros
        elif kt > 1:
            x = F.pad(x, (0, 0, 0, 0, kt - 1, 0))
        return F.conv3d(x, weight, self.bias, self.stride, (0, kh // 2, kw // 2))


class Residual(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.residual = nn.Sequential(
            Norm(dim, 3), nn.SiLU(), CausalConv(dim, out, 3),
            Norm(out, 3), nn.SiLU(), nn.Identity(), CausalConv(out, out, 3),
        )  # fmt: skip
        self.shortcut = CausalConv(dim, out, 1) if dim != out else nn.Identity()

    def forward(self, x):
        return self.shortcut(x) + self.residual(x)


class Attention(nn.Module):
    """Self-attention within each frame, one head."""

    def __init__(self, dim):
        super().__init__()
        self.norm = Norm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)  # starts as the identity, so that it does not tie the result to one size

    def forward(self, x):
        b, c, t, h, w = x.shape
        frames = x.transpose(1, 2).flatten(0, 1)
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)
        q, k, v = (part[:, None] for part in qkv.chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(b * t, c, h, w)
        return x + self.proj(out).view(b, t, c, h, w).transpose(1, 2)


def _each_frame(layer, x):
    b, _, t = x.shape[:3]
    return layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (b, t)).transpose(1, 2)


class Downsample(nn.Module):
    """Halves space, and time where asked: the first frame alone, then every two frames become one."""

    def __init__(self, dim, in_time):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, 2))
        self.time_conv = CausalConv(dim, dim, (3, 1, 1), (2, 1, 1)) if in_time else None

    def forward(self, x):
        x = _each_frame(self.resample, x)
        if self.time_conv is None or x.shape[2] == 1:
            return x
        conv = self.time_conv
        return torch.cat([x[:, :, :1], F.conv3d(x, conv.weight, conv.bias, conv.stride)], 2)


class Upsample(nn.Module):
    """Doubles space, and time where asked: the first frame stays one, every later frame becomes two."""

    def __init__(self, dim, in_time):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(dim, dim // 2, 3, padding=1)
        )
        self.time_conv = CausalConv(dim, dim * 2, (3, 1, 1)) if in_time else None

    def forward(self, x):
        if self.time_conv is not None and x.shape[2] > 1:
            pairs = self.time_conv(x[:, :, 1:]).unflatten(1, (2, x.shape[1]))  # [B, 2, C, T, H, W]
            x = torch.cat([x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], 2)
        return _each_frame(self.resample, x)


def _middle(dim):
    return nn.Sequential(Residual(dim, dim), Attention(dim), Residual(dim, dim))


def _head(dim, out):
    return nn.Sequential(Norm(dim, 3), nn.SiLU(), CausalConv(dim, out, 3))


class Encoder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1 = CausalConv(3, dim, 3)
        layers, width = [], dim
        for level, factor in enumerate((1, 2, 4, 4)):
            for _ in range(2):
                layers.append(Residual(width, dim * factor))
                width = dim * factor
            if level < 3:
                layers.append(Downsample(width, in_time=level > 0))
        self.downsamples = nn.Sequential(*layers)
        self.middle = _middle(width)
        self.head = _head(width, 2 * LATENT_CHANNELS)

    def forward(self, x):
        return self.head(self.middle(self.downsamples(self.conv1(x))))


class Decoder(nn.Module):
    def __init__(self, dim):
        super().__init__()
        width = dim * 4
        self.conv1 = CausalConv(LATENT_CHANNELS, width, 3)
        self.middle = _middle(width)
        layers = []
        for level, factor in enumerate((4, 4, 2, 1)):
            for _ in range(3):
                layers.append(Residual(width, dim * factor))
                width = dim * factor
            if level < 3:
                layers.append(Upsample(width, in_time=level < 2))
                width //= 2
        self.upsamples = nn.Sequential(*layers)
        self.head = _head(width, 3)

    def forward(self, z):
        return self.head(self.upsamples(self.middle(self.conv1(z))))


class WanVAE(nn.Module):
    """Video [B, 3, 4n+1, H, W] in [-1, 1] -> (mean, log variance), each [B, 16, n+1, H/8, W/8], and back."""

    def __init__(self, dim):
        super().__init__()
        self.encoder, self.decoder = Encoder(dim), Decoder(dim)
        self.conv1 = CausalConv(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
        self.conv2 = CausalConv(LATENT_CHANNELS, LATENT_CHANNELS, 1)
        self._start()

    @torch.no_grad()
    def _start(self):
        """Weights that keep activations near one, and latents with little noise: a noise of one drowns all colours."""
        for name, tensor in self.named_parameters():
            if tensor.ndim > 3 and "middle.1." not in name:
                tensor.normal_(std=(0.3 if name.endswith("residual.6.weight") else 1.0) * tensor[0].numel() ** -0.5)
        self.conv1.weight[LATENT_CHANNELS:] *= 0.1
        self.conv1.bias[LATENT_CHANNELS:] = -5.0

    def encode(self, video):
        return self.conv1(self.encoder(video)).chunk(2, 1)

    def decode(self, latent):
        return self.decoder(self.conv2(latent))

    def forward(self, video, noise):
        """(reconstruction, mean, log variance) with noise [B, 16, n+1, H/8, W/8] drawn for the latent."""
        mean, log_variance = self.encode(video)
        return self.decode(mean + noise * (0.5 * log_variance).exp()), mean, log_variance
