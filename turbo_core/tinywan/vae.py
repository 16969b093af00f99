"""Stage 1: the VAE, on crops of clips: pictures first, then short clips."""

import copy
import math
from pathlib import Path

import torch

from ..checkpoint.write import write_safetensors
from ..train import engine, optim, precision
from ..vae import LATENT_CHANNELS, LATENT_MEAN, LATENT_STD, WanVAE
from . import world

# frames and side of the crops, in turn: short ones show space, long ones what adds up over time
WINDOWS = (33, 48), (9, 64), (17, 64)


def train(
    folder,
    dim=8,
    steps=3000,
    image_steps=1000,
    batch=8,
    muon_lr=0.02,
    lr=2e-3,
    kl=1e-5,
    pool=192,
    side=None,
    model=None,
    fixed_latents=False,
    seed=0,
    seconds=None,
    log=print,
):
    """Train a Wan 2.1 VAE of base width dim and return it; folder keeps the checkpoint.

    model: a WanVAE to go on from. fixed_latents: train the decoder alone, for which latents need not be made again.
    pool, side: crops are of so many clips of so many pixels, default world.SIDE. image_steps: steps on `batch` pictures
    of 64x64; after that, on a quarter as many clips of the sizes in WINDOWS.
    """
    if model is None:
        torch.manual_seed(seed)
        model = fresh(dim)
    model.train().requires_grad_(True)
    for part in (model.encoder, model.conv1) if fixed_latents else ():
        part.requires_grad_(False)
    optimizer = optim.Both(model, muon_lr, lr, _is_kernel)
    wrapped = engine.parallel(model, idle_parts=True)  # pictures have no use for time
    clips_of = _pool(pool, side or world.SIDE, seed)

    def step_of(step):
        random = engine.generator(seed, step)
        still = step < image_steps
        frames, width = (1, 64) if still else WINDOWS[step % len(WINDOWS)]
        video = _crops(clips_of, batch if still else max(1, batch // 4), frames, width, random)
        noise = torch.randn(len(video), 16, (frames - 1) // 4 + 1, width // 8, width // 8, generator=random)
        video = precision.conv_layout(video)
        with precision.autocast(video.device):
            shown, mean, log_variance = wrapped(video, noise)
        mean, log_variance = mean.float(), log_variance.float().clamp(-20, 10)
        error = (shown.float() - video).square().mean()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        (error + kl * divergence).backward()
        norm = optimizer.step(optim.schedule(step, steps))
        return {"psnr": 10 * math.log10(4 / error.item()), "kl": divergence.item(), "gradient": norm}

    history = engine.run(step_of, {"model": model, "optimizer": optimizer}, folder, steps, seconds, log=log)
    return model, history


@torch.no_grad()
def fresh(dim: int) -> WanVAE:
    """A VAE to be trained: weights that keep activations near one, and latents with little noise, since a noise of one
    drowns all colours. Attention starts as the identity, so that it does not tie the result to one size."""
    model = WanVAE(dim)
    for name, tensor in model.named_parameters():
        if name.endswith("middle.1.proj.weight"):
            tensor.zero_()
        elif tensor.ndim > 3 and "middle.1." not in name:
            tensor.normal_(std=(0.3 if name.endswith("residual.6.weight") else 1.0) * tensor[0].numel() ** -0.5)
    model.conv1.weight[LATENT_CHANNELS:] *= 0.1
    model.conv1.bias[LATENT_CHANNELS:] = -5.0
    return model


def _is_kernel(name: str, tensor) -> bool:
    inner = name.split(".", 2)[1] in ("downsamples", "middle", "upsamples")
    return inner and tensor.ndim > 3


def _pool(count: int, side: int, seed: int) -> torch.Tensor:
    """Clips to take crops from: uint8 [count, 3, FRAMES, side, side]."""
    random = engine.generator(seed, 0, stream=1)
    scenes = world.random_scenes(count, random, held_out=None)
    parts = [world.render(some, world.FRAMES, side, side, random) for some in scenes.split(16)]
    return torch.cat([((part + 1) * 127.5).round().to(torch.uint8) for part in parts])


def _crops(pool, count: int, frames: int, width: int, random) -> torch.Tensor:
    """Random windows of time and space, of two the one that shows more: float32 [count, 3, frames, width, width] in
    [-1, 1]."""
    most, side = pool.shape[2], pool.shape[4]

    def pick(high):
        return int(torch.randint(high, (), generator=random))

    def window():
        clip, t, y, x = pick(len(pool)), pick(most - frames + 1), *(8 * pick((side - width) // 8 + 1) for _ in "yx")
        return pool[clip, :, t : t + frames, y : y + width, x : x + width].float() / 127.5 - 1

    return torch.stack([max((window() for _ in "ab"), key=torch.std) for _ in range(count)])


@torch.no_grad()
def match_statistics(model: WanVAE, video: torch.Tensor) -> None:
    """Give the latents the mean and deviation that the DiT's side of Wan 2.1 expects; reconstructions stay the same.

    The last layer of the encoder and the first of the decoder are 1x1x1 convolutions, which take the change up.
    """
    latent = model.encode(video)[0].float()
    axes = (0, 2, 3, 4)
    scale = torch.tensor(LATENT_STD) / latent.std(axes).clamp_min(1e-3)
    shift = torch.tensor(LATENT_MEAN) - latent.mean(axes) * scale
    last, first = model.conv1, model.conv2
    last.weight[:16] *= scale.view(-1, 1, 1, 1, 1)
    last.bias[:16] = last.bias[:16] * scale + shift
    last.bias[16:] += 2 * scale.log()
    first.bias -= (first.weight[:, :, 0, 0, 0] / scale) @ shift
    first.weight /= scale.view(1, -1, 1, 1, 1)


@torch.no_grad()
def make_small(model: WanVAE, factor: float) -> None:
    """Multiply what the residual layers add up by a power of two, which the norms behind it cancel: the same numbers in
    float32 and bfloat16, and none that leaves the range of float16. After training: rates are for weights of one."""
    for part in (model.encoder, model.decoder):
        for name, tensor in part.named_parameters():
            layer, _, kind = name.rpartition(".")
            whole = layer == "conv1" or layer.endswith(("residual.6", ".proj"))  # from a norm, or from outside
            if whole or (kind == "bias" and layer.endswith(("shortcut", "resample.1", "time_conv"))):
                tensor *= factor


def finish(model: WanVAE, seed: int = 0) -> None:
    """What a trained VAE still needs before its latents are used: Wan's statistics, measured over whole clips."""
    random = engine.generator(seed, 0, stream=2)
    match_statistics(model, world.render(world.random_scenes(8, random), world.FRAMES, world.SIDE, world.SIDE, random))
    model.eval().requires_grad_(False)


def save(model: WanVAE, path) -> Path:
    """A trained VAE as ComfyUI and the pipeline read it, bfloat16, in numbers that float16 holds too."""
    model = copy.deepcopy(model)
    make_small(model, 2.0**-6)
    state = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    write_safetensors(path, state, {"format": "pt"})
    return Path(path)
