"""Stage 3: the teacher, by flow matching: velocity = noise - clip along x_t = (1 - t) clip + t noise."""

import torch

from . import data as data_module
from . import engine, optim
from .dit import TrainWan, train_dense

SHIFT = 3.0  # of the time, as Wan is sampled
GUIDANCE = 3.0


def times(count: int, random: torch.Generator) -> torch.Tensor:
    """Times of a training batch: logit-normal, shifted towards noise, every tenth uniform."""
    t = torch.randn(count, generator=random).sigmoid()
    t = SHIFT * t / (1 + (SHIFT - 1) * t)
    uniform = torch.rand(count, generator=random)
    return torch.where(torch.rand(count, generator=random) < 0.1, uniform, t)


def frames_of(total: int, kept: int, random: torch.Generator):
    """Which latent frames a batch shows: all, or `kept` of them in order: the first, which is one picture and unlike
    the others, and a random choice of the rest."""
    if kept >= total:
        return torch.arange(total)
    others = 1 + torch.randperm(total - 1, generator=random)[: kept - 1].sort().values
    return torch.cat([torch.zeros(1, dtype=torch.long), others])


def mix(clean, noise, t):
    """x_t of a rectified flow; t [B]."""
    t = t.view(-1, 1, 1, 1, 1)
    return (1 - t) * clean + t * noise


def train(model: TrainWan, data, folder, steps, batch=16, kept_frames=99, muon_lr=2e-3, lr=1e-3, decay=0.998,
          dropout=0.1, seed=0, seconds=None, device="cpu", shard=False, log=print):  # fmt: skip
    """Train model by flow matching on a Data; returns (moving average of the weights, history).

    kept_frames: latent frames of each clip that a step looks at. decay: of the moving average. dropout: share of
    empty captions, which guidance needs.
    """
    train_dense(model)
    wrapped = engine.parallel(model, shard)
    average = optim.Average(model)
    optimizer = optim.Both(model, muon_lr, lr, optim.in_blocks)

    def step_of(step):
        random = engine.generator(seed, step)
        clean, context, lengths = data_module.batch(data, batch, random, dropout, device)
        frames = frames_of(clean.shape[2], kept_frames, random).to(device)
        clean = clean[:, :, frames]
        noise = torch.randn(clean.shape, generator=random).to(device)
        t = times(batch, random).to(device)
        with torch.autocast(str(device).split(":")[0], dtype=torch.bfloat16):
            velocity = wrapped(mix(clean, noise, t), 1000 * t, context, lengths, frames=frames)
        loss = (velocity.float() - (noise - clean)).square().mean()
        loss.backward()
        norm = optimizer.step(optim.schedule(step, steps))
        average.follow(model, min(decay, (1 + step) / (10 + step)))
        return {"loss": loss.item(), "gradient": norm}

    parts = {"model": model, "optimizer": optimizer, "average": average}
    history = engine.run(step_of, parts, folder, steps, seconds, log=log)
    return average.copy_into(model), history


@torch.no_grad()
def guided(model, x, t, context, lengths, empty, guidance: float, **options):
    """Velocity with classifier-free guidance; t [B] in 0 to 1, empty: (context, lengths) of the empty caption."""
    if guidance == 1.0:
        return model(x, 1000 * t, context, lengths, **options)
    blank, blank_lengths = (part.expand(len(x), *part.shape[1:]) for part in empty)
    width = context.shape[1] - blank.shape[1]
    blank = torch.nn.functional.pad(blank, (0, 0, 0, width)) if width > 0 else blank[:, : context.shape[1]]
    both = model(
        torch.cat([x, x]), 1000 * torch.cat([t, t]), torch.cat([context, blank]), torch.cat([lengths, blank_lengths]),
        **options,
    )  # fmt: skip
    wanted, unwanted = both.chunk(2)
    return unwanted + guidance * (wanted - unwanted)


@torch.no_grad()
def sample_ode(model, noise, context, lengths, empty, steps=50, guidance=GUIDANCE, **options):
    """Clips by Euler's method on the shifted schedule: latents like noise."""
    t = torch.linspace(1, 0, steps + 1)
    t = SHIFT * t / (1 + (SHIFT - 1) * t)
    x = noise
    for now, after in zip(t[:-1].tolist(), t[1:].tolist()):
        at = torch.full((len(x),), now, device=x.device)
        x = x + (after - now) * guided(model, x, at, context, lengths, empty, guidance, **options).float()
    return x
