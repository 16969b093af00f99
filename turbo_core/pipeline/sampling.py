"""The way from noise to latents, a step at a time."""

import time

import torch

from ..devices import synchronize, widest_float
from ..parallel import Rows
from ..sampler import sample_rcm
from ..vae import MOST_FRAMES, decode_each, decode_rows, encode_video, frames_of_a_piece
from ..wan import Text
from .video import to_frames


class Trajectory:
    """A video between noise and latents. Its steps may be taken in parts, with other videos between them: the state is
    its own, and one generator supplies all its noise, through changes of the expert too."""

    def __init__(
        self,
        context: torch.Tensor | None,
        shape,
        sigmas: torch.Tensor,
        *,
        y=None,
        seed=0,
        topk=None,
        precision="bf16",
        ode=False,
        device="cpu",
        noise_device="cpu",
    ):
        """context [B, 512, text_dim]; shape [B, 16, T, H, W]; sigmas [steps + 1], the last one 0; y: what an
        image-to-video model is given of the image, see encode_image. The state is float64 (float32 on MPS)."""
        self.device, self.shape, self.sigmas = torch.device(device), shape, sigmas
        self.ode, self.settings = ode, {"y": y, "topk": topk, "precision": precision}
        self.text = None if context is None else Text(context)
        self.noise_device, self.generator = noise_device, torch.Generator(noise_device).manual_seed(seed)
        self.x = self._noise().to(widest_float(self.device)) * sigmas[0].item()
        self.done = 0

    def advance(self, model_at, until: int | None = None, step_seconds: list | None = None, progress=None) -> None:
        """Take the steps up to `until`, default all.

        model_at: callable (sigma) -> WanModel. The network gets the timestep 1000 * sigma rounded to bfloat16 in every
        dtype: that is the value the distilled student was trained to see. step_seconds takes the time of each network
        evaluation. progress: callable (steps done).
        """
        until = len(self.sigmas) - 1 if until is None else until

        def denoise(x, sigma):
            model = model_at(sigma[0].item())
            start = time.perf_counter()
            timestep = (sigma.float() * 1000).to(torch.bfloat16).float()
            velocity = model(x.float(), timestep, self.text, **self.settings)
            synchronize(self.device)
            if step_seconds is not None:
                step_seconds.append(time.perf_counter() - start)
            return x - sigma.view(-1, 1, 1, 1, 1) * velocity.to(x.dtype)

        first = self.done
        callback = (lambda event: progress(first + event["i"] + 1)) if progress else None
        part = self.sigmas[first : until + 1]
        self.x = sample_rcm(denoise, self.x, part, ode=self.ode, noise_sampler=self._noise, callback=callback)
        self.done = until

    def latents(self) -> torch.Tensor:
        """Latents float32 of the shape asked for."""
        return self.x.float()

    def _noise(self, *_):
        return torch.randn(self.shape, generator=self.generator, device=self.noise_device).to(self.device)


def sample(model_at, context, shape, sigmas, *, step_seconds=None, progress=None, **settings) -> torch.Tensor:
    """Latents float32 of this shape, all steps at once; arguments as of Trajectory and its advance."""
    trajectory = Trajectory(context, shape, sigmas, **settings)
    trajectory.advance(model_at, step_seconds=step_seconds, progress=progress)
    return trajectory.latents()


def decode_frames(
    vae, latents: torch.Tensor, tiled: bool = False, progress=None, team=None, beside: bool = False
) -> torch.Tensor | None:
    """Frames uint8 [4(T-1)+1, 8H, 8W, 3] on the CPU of normalized latents [1, 16, T, H, W]; a device holds numbers of a
    piece of the video only. progress: callable (done, total). team: processes that decode together, each some rows,
    where there are as many and no tiles; the others than the first get None. beside: another clip is sampled meanwhile,
    so on a card a piece is one latent frame, as residence counts it: what is free now sampling may want in a moment.
    Raises TurboError when the VAE gives NaN or infinity."""

    def keep(piece):
        return to_frames(piece[0])

    if team is not None and team.size > 1:
        if latents.shape[3] >= team.size and not tiled:
            return _decoded_together(vae, latents, keep, progress, team)
        if not team.first:
            return None
    most = 1 if beside and latents.device.type != "cpu" else MOST_FRAMES
    return torch.cat(decode_each(vae, latents, keep, tiled, progress, most))


def _decoded_together(vae, latents, keep, progress, team):
    rows, device = Rows(team.sequence, latents.shape[3]), latents.device
    pixels = 64 * latents.shape[4] * max(rows.counts)
    most = team.told(lambda: frames_of_a_piece(vae.counted("decode"), pixels, vae.dim, vae.dtype, device))
    kept = []
    for piece in decode_rows(vae, latents, rows, most):
        whole = rows.to_first(keep(piece).to(device))
        if team.first:
            kept.append(whole.cpu())
            progress((sum(map(len, kept)) - 1) // 4 + 1, latents.shape[2])
    return torch.cat(kept) if team.first else None


def encode_image(vae, image: torch.Tensor, frames: int) -> torch.Tensor:
    """Conditioning [1, 20, T, H/8, W/8] float32 for a 36-channel model from an image [3, H, W] in [-1, 1].

    4 mask channels, one on the first latent frame, then the latents of a clip that is the image and then grey (0).
    """
    clip = image.new_zeros(1, 3, frames, *image.shape[1:])
    clip[0, :, 0] = image
    latent = encode_video(vae, clip)
    mask = torch.zeros_like(latent[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, latent], 1)
