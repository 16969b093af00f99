"""Contenders for the Wan VAE: our pieces and diffusers' AutoencoderKLWan, with the same random weights.

Shapes are B x DIM x T x H x W: a batch of videos of T = 4n + 1 frames, the VAE's base width (96 in the published one, 8
in TinyWan's). The oracle is our network in float64 over the first five frames: later ones do not change them.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..vae import LATENT_CHANNELS, LATENT_MEAN, LATENT_STD, TinyDecoder, WanVAE, decode_each, decode_video, encode_video
from ..vae.files import diffusers_name
from .harness import Case, Contender, Missing, exact, relative_error
from .linear import dtype_of

PUBLISHED = 96  # the base width that tiny decoders stand for
CPU_SHAPES = ((1, 8, 33, 128, 128), (1, 96, 5, 64, 64))
QUICK_SHAPES = ((1, 8, 9, 24, 16),)
BOUND = {torch.float32: 1e-5, torch.bfloat16: 0.05}


def shapes(device, quick=False) -> list[tuple[int, ...]]:
    """(B, DIM, T, H, W) of the cases of a device."""
    if quick:
        return list(QUICK_SHAPES)
    return list(CPU_SHAPES) if torch.device(device).type == "cpu" else [(1, 96, 81, 480, 832)]


def cases(device, sizes=None, quick=False):
    """Functions that make the cases, each when it is its turn."""
    for shape in sizes or shapes(device, quick):
        yield lambda shape=shape: _case("decode", device, shape)
        yield lambda shape=shape: _case("encode", device, shape)


def _case(work, device, shape) -> Case:
    batch, dim, frames, height, width = shape
    dtype = dtype_of(device)
    ours = _network(dim).to(device, dtype)
    random = torch.Generator().manual_seed(0)
    latent = torch.randn(batch, LATENT_CHANNELS, (frames - 1) // 4 + 1, height // 8, width // 8, generator=random)
    video = torch.rand(batch, 3, frames, height, width, generator=random) * 2 - 1
    given, run = (latent, decode_video) if work == "decode" else (video, encode_video)
    given = given.to(device)
    first = given[:, :, : 2 if work == "decode" else 5]
    want = run(_network(dim).double(), first.cpu())

    def error(found):
        return relative_error(found[:, :, : want.shape[2]].cpu(), exact(want))

    def plain():
        return lambda: run(ours, given)

    def theirs():
        model = _diffusers(ours)
        mean, std = (torch.tensor(row, device=device).view(1, -1, 1, 1, 1) for row in (LATENT_MEAN, LATENT_STD))
        if work == "decode":
            return lambda: model.decode((given * std + mean).to(dtype)).sample.float()
        return lambda: (model.encode(given.to(dtype)).latent_dist.mode().float() - mean) / std

    contenders = [
        Contender("diffusers", theirs, error, BOUND[dtype]),
        Contender("turbo-core", plain, error, BOUND[dtype]),
    ]
    if work == "decode":
        one = Contender("turbo-core, one latent frame at a time", lambda: _in_ones(ours, given), error, BOUND[dtype])
        contenders.append(one)
        if dim == PUBLISHED:
            said = "another network, for drafts"
            contenders.append(
                Contender("turbo-core, TAEHV", lambda: _draft(given, dtype), None, None, flop=0.0, note=said)
            )
    name = f"{work} {frames} frames of {height} x {width}, base width {dim}"
    sizes = {"b": batch, "dim": dim, "t": frames, "h": height, "w": width}
    return Case(name, sizes, contenders, ("diffusers", "turbo-core"), flop=_flop(work, dim, latent, video))


def _network(dim) -> WanVAE:
    """Random weights that keep activations near one, as those of a trained VAE."""
    torch.manual_seed(0)
    model = WanVAE(dim).eval().requires_grad_(False)
    for name, tensor in model.named_parameters():
        if tensor.ndim > 3 and not name.endswith("gamma"):
            small = name.endswith(("residual.6.weight", "proj.weight"))
            tensor.normal_(std=(0.3 if small else 1.0) * tensor[0].numel() ** -0.5)
    return model


def _in_ones(vae, latent):
    def run():
        return torch.cat(decode_each(vae, latent, lambda piece: piece, most=1), 2)

    return run


def _draft(latent, dtype):
    torch.manual_seed(0)
    decoder = TinyDecoder(takes_raw=False).eval().requires_grad_(False).to(latent.device, dtype)
    return lambda: decode_video(decoder, latent)


def _diffusers(ours):
    try:
        from diffusers import AutoencoderKLWan
    except ImportError:
        raise Missing("diffusers is not installed") from None
    model = AutoencoderKLWan(base_dim=ours.dim, z_dim=LATENT_CHANNELS).eval().requires_grad_(False)
    model.load_state_dict({diffusers_name(n): value for n, value in ours.state_dict().items()}, assign=True)
    return model


def _flop(work, dim, latent, video) -> float:
    """Counted by shape."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"), torch.no_grad():
        model = WanVAE(dim)
        model.decode(latent.to("meta")) if work == "decode" else model.encode(video.to("meta"))
    return float(counter.get_total_flops())
