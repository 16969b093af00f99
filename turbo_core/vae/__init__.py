"""The Wan 2.1 VAE of our own: the network, its files, and videos through it in exact pieces."""

from .coders import Coders
from .coding import LATENT_MEAN, LATENT_STD, decode_each, decode_video, encode_video, raw_pieces
from .files import build_vae, load_vae
from .memory import MOST_FRAMES, frames_of_a_piece
from .network import LATENT_CHANNELS, WanVAE
from .tiny import TinyDecoder, load_fast
from .together import decode_rows

__all__ = [
    "LATENT_CHANNELS", "LATENT_MEAN", "LATENT_STD", "MOST_FRAMES", "Coders", "TinyDecoder", "WanVAE", "build_vae",
    "decode_each", "decode_rows", "decode_video", "encode_video", "frames_of_a_piece", "load_fast", "load_vae",
    "raw_pieces",
]  # fmt: skip
