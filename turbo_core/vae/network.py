"""The Wan 2.1 VAE as a network, of any base width, for inference and training."""

import torch
from torch import nn

from .layers import Attention, CausalConv, Downsample, Norm, Pointwise, Residual, Upsample, activated
from .past import Past

LATENT_CHANNELS = 16


class _Middle(nn.Sequential):
    def __init__(self, dim):
        super().__init__(Residual(dim, dim), Attention(dim), Residual(dim, dim))

    def forward(self, x, past: Past):
        before, attention, after = self
        return after(attention(before(x, past), past), past)


class _Head(nn.Sequential):
    def __init__(self, dim, out):
        super().__init__(Norm(dim, 3), nn.SiLU(), CausalConv(dim, out, 3))

    def forward(self, x, past: Past):
        norm, _, layer = self
        return layer.over(activated(x, norm, layer, past), past)


class Encoder(nn.Module):
    """A piece of video [B, 3, T, H, W] -> [B, 32, T', H/8, W/8]: T' = 1 for the first frame, T / 4 after it."""

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
        self.downsamples = nn.ModuleList(layers)
        self.middle = _Middle(width)
        self.head = _Head(width, 2 * LATENT_CHANNELS)

    def forward(self, x, past: Past):
        x = self.conv1(x, past)
        for layer in self.downsamples:
            x = layer(x, past)
        return self.head(self.middle(x, past), past)


class Decoder(nn.Module):
    """Latent frames [B, 16, T, H, W] -> a piece of video [B, 3, T', 8H, 8W]: T' = 1 for the first, 4T after it."""

    def __init__(self, dim):
        super().__init__()
        width = dim * 4
        self.conv1 = CausalConv(LATENT_CHANNELS, width, 3)
        self.middle = _Middle(width)
        layers = []
        for level, factor in enumerate((4, 4, 2, 1)):
            for _ in range(3):
                layers.append(Residual(width, dim * factor))
                width = dim * factor
            if level < 3:
                layers.append(Upsample(width, in_time=level < 2))
                width //= 2
        self.upsamples = nn.ModuleList(layers)
        self.head = _Head(width, 3)

    def forward(self, z, past: Past):
        x = self.middle(self.conv1(z, past), past)
        for layer in self.upsamples:
            x = layer(x, past)
        return self.head(x, past)


class WanVAE(nn.Module):
    """Video [B, 3, 4n+1, H, W] in [-1, 1] -> (mean, log variance), each [B, 16, n+1, H/8, W/8], and back.

    dim: the base width, 96 in the published files. Source: wan/modules/vae.py of Wan-Video/Wan2.1.
    """

    takes_raw = True  # latents as its encoder makes them

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        self.encoder, self.decoder = Encoder(dim), Decoder(dim)
        self.conv1 = Pointwise(2 * LATENT_CHANNELS, 2 * LATENT_CHANNELS, 1)
        self.conv2 = Pointwise(LATENT_CHANNELS, LATENT_CHANNELS, 1)

    @property
    def place(self) -> torch.device:
        """The device of its weights; a host that moves networks writes a `device` of its own to them."""
        return self.conv2.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.conv2.weight.dtype

    def told(self) -> str:
        """Its name for a person."""
        return f"Wan VAE of width {self.dim}"

    def counted(self, work: str) -> str:
        """What memory.py counts this work as."""
        return work

    def encode_piece(self, video, past: Past):
        """Moments [B, 32, T', H/8, W/8] of a video's first frame, or of the next 4k frames."""
        moments = self.conv1(self.encoder(video, past))
        past.first = False
        return moments

    def decode_piece(self, latent, past: Past):
        """The frames of the first latent frame, or of the next k ones; not clamped."""
        video = self.decoder(self.conv2(latent), past)
        past.first = False
        return video

    def encode(self, video):
        """(mean, log variance) of a whole video."""
        past = Past()
        pieces = [self.encode_piece(piece, past) for piece in (video[:, :, :1], video[:, :, 1:]) if piece.shape[2]]
        return torch.cat(pieces, 2).chunk(2, 1)

    def decode(self, latent):
        """The whole video of latents as `encode` makes them, not clamped."""
        past = Past()
        pieces = [self.decode_piece(piece, past) for piece in (latent[:, :, :1], latent[:, :, 1:]) if piece.shape[2]]
        return torch.cat(pieces, 2)

    def forward(self, video, noise):
        """(reconstruction, mean, log variance) with noise [B, 16, n+1, H/8, W/8] drawn for the latent."""
        mean, log_variance = self.encode(video)
        return self.decode(mean + noise * (0.5 * log_variance).exp()), mean, log_variance
