"""Videos to normalized latents and back, in pieces of as many frames as the memory holds, or in tiles."""

import logging

import torch

from ..devices import OutOfMemory, is_out_of_memory, release
from ..errors import TurboError
from . import tiles
from .memory import MOST_FRAMES, fits, frames_of_a_piece
from .network import LATENT_CHANNELS, WanVAE
from .past import Past

# Per-channel statistics of the latents; the DiT works on (latent - mean) / std. Published with the Wan 2.1 VAE.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
_LOG = logging.getLogger(__name__)


@torch.no_grad()
def encode_video(vae: WanVAE, video: torch.Tensor, tiled: bool = False) -> torch.Tensor:
    """Normalized latents [B, 16, (T-1)/4+1, H/8, W/8] float32, on the VAE's device, of a video [B, 3, T, H, W] in
    [-1, 1].

    The mean of the posterior is taken, nothing is sampled. Memory, tiled and errors: as in `decode_each`.
    """
    if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] % 4 != 1 or video.shape[3] % 8 or video.shape[4] % 8:
        raise TurboError(
            f"VAE: a video must be [B, 3, T, H, W] with T = 4n + 1 and H, W multiples of 8, got {list(video.shape)}. "
            "Leave frames out at the end, and crop or resize them."
        )

    def run(piece, past):
        return _wide(finite(vae, vae.encode_piece(piece, past))[:, :LATENT_CHANNELS])

    kept = _Job(vae, "encode", run, video, (4, 1)).run(tiled, lambda latent: latent)
    mean, std = _statistics(vae.place)
    return (torch.cat(kept, 2).to(vae.place) - mean) / std


@torch.no_grad()
def decode_video(vae, latent: torch.Tensor, tiled: bool = False) -> torch.Tensor:
    """Video [B, 3, 4(T-1)+1, 8H, 8W] float32 in [-1, 1] of normalized latents [B, 16, T, H, W]; see `decode_each`."""
    return torch.cat(decode_each(vae, latent, lambda piece: piece, tiled), 2)


@torch.no_grad()
def decode_each(vae, latent: torch.Tensor, keep, tiled: bool = False, progress=None, most: int = MOST_FRAMES) -> list:
    """What `keep` makes of each piece of the video, in order: of the first frame, then of some frames at a time.

    vae: WanVAE or TinyDecoder. latent: normalized, [B, 16, T, H, W]. keep: callable (float32 [B, 3, t, 8H, 8W] in
    [-1, 1], on the VAE's device or on the CPU). tiled: decode in overlapping tiles of 256 pixels, which takes a
    fraction of the memory and blends seams; without, the numbers are those of the whole video, whatever the pieces. A
    device that runs full gets smaller pieces, then tiles. progress: callable (done, total). most: latent frames of a
    piece.
    Raises TurboError for latents of another shape, with NaN or infinity, for such pixels, and where the memory is not
    enough.
    """
    if latent.ndim != 5 or latent.shape[1] != LATENT_CHANNELS or 0 in latent.shape:
        raise TurboError(
            f"VAE: latents must be [B, {LATENT_CHANNELS}, T, H, W], got {list(latent.shape)}: those of another model "
            "need its own VAE."
        )
    if not torch.isfinite(latent).all():
        raise TurboError("VAE: the latents hold NaN or infinity: sampling failed. Use bfloat16 or float32 for it.")

    def run(piece, past):
        return _wide(finite(vae, vae.decode_piece(piece, past))).clamp_(-1, 1)

    return _Job(vae, "decode", run, as_taken(vae, latent), (1, 4), progress, most).run(tiled, keep)


def as_taken(vae, latent):
    """Normalized latents as a decoder takes them, in float32 or float64."""
    if not vae.takes_raw:
        return _wide(latent)
    mean, std = _statistics(latent.device)
    return _wide(latent) * std + mean


def raw_pieces(vae: WanVAE, work: str, source: torch.Tensor):
    """What encode_piece ("encode") or decode_piece ("decode") gives for a whole video or its latents, piece by piece.

    Fewer frames a piece where the device runs full; the error of a device on which not one latent frame fits is left to
    the caller.
    """
    job = _Job(vae, work, getattr(vae, f"{work}_piece"), source, (4, 1) if work == "encode" else (1, 4))
    yield from job.pieces(source, job.latents)


def finite(vae, x):
    """x; raises TurboError where it holds NaN or infinity, which would be a black clip, or data that nobody can use."""
    if not x.isfinite().all():
        cure = "compute in bfloat16 or float32" if vae.dtype == torch.float16 else "check its file: turbo-core inspect"
        raise TurboError(f"VAE: it gave NaN or infinity in {vae.dtype}. {cure[0].upper()}{cure[1:]}.")
    return x


def _wide(x):
    """In float32, or float64 where it came so."""
    return x if x.dtype == torch.float64 else x.float()


def _statistics(device):
    return (torch.tensor(row, device=device).view(1, -1, 1, 1, 1) for row in (LATENT_MEAN, LATENT_STD))


class _Job:
    """One video on its way through encoder or decoder. scales: frames of source and result to a latent frame."""

    def __init__(self, vae, work, run, source, scales, progress=None, most=MOST_FRAMES):
        self.vae, self.work, self.step, self.source = vae, work, run, source
        self.counted = vae.counted(work)
        self.frames_in, self.frames_out = scales
        self.side_in, self.side_out = (8, 1) if work == "encode" else (1, 8)
        self.latents = (source.shape[2] - 1) // self.frames_in + 1
        self.height, self.width = (side // self.side_in for side in source.shape[3:])  # in latent pixels
        self.most = most
        self.progress, self.done = progress or (lambda done, total: None), 0

    def run(self, tiled, keep):
        problem = None
        vae, area = self.vae, self._area(self.source)
        if not tiled and not fits(self.counted, area, vae.dim, vae.dtype, vae.place):
            tiled = True
            _LOG.warning("%s the video in one piece takes more memory than is free: in tiles.", self.work)
        if not tiled:
            try:
                return [keep(piece) for piece in self.pieces(self.source, self.latents)]
            except (RuntimeError, MemoryError) as error:
                problem = _shortage(error)  # words alone: the error itself holds the tensors of its frames
            _LOG.warning("%s the video in one piece takes too much memory (%s): in tiles now.", self.work, problem)
            release(self.vae.place)
        try:
            video = self._in_tiles()
            return [keep(piece) for piece in video.split(max(1, self.frames_out) * MOST_FRAMES, 2)]
        except (RuntimeError, MemoryError) as error:
            problem = _shortage(error)
        release(self.vae.place)
        raise OutOfMemory(
            f"VAE: out of memory ({problem}) even with one latent frame of a tile at a time. Free some of "
            f"{self.vae.place}'s memory, or choose a smaller size or fewer frames."
        )

    def pieces(self, source, total):
        """Results for the first frame, then for some latent frames at a time; fewer where the device runs full."""
        device = self.vae.place
        frames = frames_of_a_piece(self.counted, self._area(source), self.vae.dim, self.vae.dtype, device)
        most = min(self.most, frames)
        past, start = Past(), 0
        while start < source.shape[2]:
            stop = min(start + self.frames_in * most, source.shape[2]) if start else 1
            before, full = past.copy(), False
            try:
                result = self.step(self._packed(source[:, :, start:stop]), past)
            except (RuntimeError, MemoryError) as error:
                if most == 1 or not start or not is_out_of_memory(error):
                    raise
                full = True
            if full:  # here, where the error and what it holds are gone
                most, past = most // 2, before
                release(device)
                continue
            yield result
            self.done += (stop - start - 1) // self.frames_in + 1
            self.progress(self.done, total)
            start = stop

    def _area(self, source):
        """Pixels of a frame of all videos."""
        return source.shape[0] * source.shape[3] * source.shape[4] * (8 // self.side_in) ** 2

    def _packed(self, piece):
        device = self.vae.place
        layout = torch.contiguous_format if device.type == "mps" else torch.channels_last_3d
        return piece.to(device, self.vae.dtype).contiguous(memory_format=layout)

    def _in_tiles(self):
        """The whole result on the CPU, of tiles that go through one by one."""
        self.done = 0
        plan = tiles.tiles(self.height, self.width)
        result = None
        for rows, columns in plan:
            (top, bottom), (left, right) = rows, columns
            s = self.side_in
            part = self.source[..., top * s : bottom * s, left * s : right * s]
            s = self.side_out
            share = tiles.weights(rows, self.height, s)[:, None] * tiles.weights(columns, self.width, s)
            start = 0
            for piece in self.pieces(part, len(plan) * self.latents):
                piece = piece.cpu()
                if result is None:
                    frames = (self.latents - 1) * self.frames_out + 1
                    result = piece.new_zeros(*piece.shape[:2], frames, self.height * s, self.width * s)
                stop = start + piece.shape[2]
                result[:, :, start:stop, top * s : bottom * s, left * s : right * s] += piece * share
                start = stop
        return result


def _shortage(error: Exception) -> str:
    """What an error says of the memory that ran out; raises it where it is about something else."""
    if not is_out_of_memory(error):
        raise error
    return (str(error).splitlines() or ["no memory"])[0][:200]
