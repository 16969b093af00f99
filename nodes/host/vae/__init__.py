"""The host's VAE with our network inside: its loading, offload, batches and tiles stay the host's."""

import copy

import comfy.model_management
import comfy.model_patcher
import torch

from ....turbo_core.errors import TurboError
from ....turbo_core.selfcheck import prove
from ....turbo_core.vae import WanVAE, build_vae, raw_pieces
from ....turbo_core.vae.memory import piece_bytes

_NUMBERS = 3 * 4 * 64  # of a latent pixel and frame, in the video


class HostVAE(WanVAE):
    """Our network with the methods that the host calls on a VAE's."""

    def encode(self, video):
        """Mean [B, 16, n+1, H/8, W/8] of [B, 3, T, H, W]: frames beyond 4n + 1 are left out, as the host's own does."""
        frames = (video.shape[2] - 1) // 4 * 4 + 1
        return torch.cat([moments[:, :16] for moments in raw_pieces(self, "encode", video[:, :, :frames])], 2)

    def decode(self, latent):
        """Video [B, 3, 4n+1, 8H, 8W] of [B, 16, n+1, H, W]."""
        return torch.cat(list(raw_pieces(self, "decode", latent)), 2)


def turbo_vae(vae):
    """A copy of a host's VAE that computes by HostVAE, with weights of its own.

    Raises TurboError for any other VAE than Wan 2.1's.
    """
    network = getattr(vae, "first_stage_model", None)
    if network is None or not hasattr(vae, "vae_dtype"):
        raise TurboError(f"Turbo VAE got no VAE but {type(vae).__name__}: connect one, from Load VAE.")
    if isinstance(network, HostVAE):
        return vae
    prove(vae.device, ("vae",))
    management = comfy.model_management
    offload = management.vae_offload_device()
    state = {name: tensor.detach().clone() for name, tensor in vae.get_sd().items()}  # two owners would move one weight
    ours = build_vae(state, "the VAE that is connected", offload, vae.vae_dtype, HostVAE)
    made = copy.copy(vae)
    made.first_stage_model = ours
    made.patcher = comfy.model_patcher.ModelPatcher(ours, load_device=vae.device, offload_device=offload)
    made.memory_used_decode = lambda shape, dtype: _bytes("decode", ours, shape, 64, shape[2], dtype)
    made.memory_used_encode = lambda shape, dtype: _bytes("encode", ours, shape, 1, (shape[2] + 3) // 4, dtype)
    return made


def _bytes(work, network, shape, pixels, frames, dtype):
    """What one video takes on the device: the work on a latent frame, and the video in one piece and joined."""
    area = shape[3] * shape[4] * pixels
    return piece_bytes(work, area, 1, network.dim, dtype) + 2 * _NUMBERS * frames * area // 64 * dtype.itemsize
