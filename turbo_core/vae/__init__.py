"""The Wan 2.1 VAE of our own: the network, its files, and videos through it in exact pieces."""

from .coding import LATENT_MEAN, LATENT_STD, decode_each, decode_video, encode_video, raw_pieces
from .files import build_vae, load_vae
from .network import LATENT_CHANNELS, WanVAE

__all__ = [
    "LATENT_CHANNELS", "LATENT_MEAN", "LATENT_STD", "WanVAE", "build_vae", "decode_each", "decode_video",
    "encode_video", "load_vae", "raw_pieces",
]  # fmt: skip
