"""One video decoded by several processes, each of which holds some rows of every frame."""

import torch

from .coding import as_taken, finite
from .past import Past


@torch.no_grad()
def decode_rows(vae, latent: torch.Tensor, rows, most: int):
    """This process's rows of the video, of the first frame and then of `most` latent frames at a time: float32
    [B, 3, t, 8 own, 8W] in [-1, 1], with the numbers of the whole.

    latent: normalized, [B, 16, T, H, W], on the VAE's device, whole in every process. rows: turbo_core.parallel.Rows of
    H. most: the same in all processes. Raises TurboError for NaN and infinity.
    """
    own = as_taken(vae, latent)[..., rows.own, :].to(vae.dtype)
    past = Past(rows=rows)
    for piece in (own[:, :, :1], *own[:, :, 1:].split(most, 2)):
        if piece.shape[2]:
            packed = piece.contiguous(memory_format=torch.channels_last_3d)
            yield finite(vae, vae.decode_piece(packed, past)).float().clamp_(-1, 1)
