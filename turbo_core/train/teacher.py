"""Stage 3: the teacher, by flow matching: velocity = noise - clip along x_t = (1 - t) clip + t noise."""

import itertools

import torch

from ..wan import WanModel
from . import data as data_module
from . import engine, optim, precision
from .experts import Experts
from .models import compile_blocks, train_dense

SHIFT = 3.0  # of the times
GUIDANCE = 3.0


def shifted(t, shift: float):
    """Times moved towards noise, as a flow's sampling schedule moves them."""
    return shift * t / (1 + (shift - 1) * t)


def times(count: int, random: torch.Generator, shift: float = SHIFT) -> torch.Tensor:
    """Times of a training batch: logit-normal, shifted towards noise, every tenth uniform."""
    t = shifted(torch.randn(count, generator=random).sigmoid(), shift)
    uniform = torch.rand(count, generator=random)
    return torch.where(torch.rand(count, generator=random) < 0.1, uniform, t)


def mix(clean, noise, t):
    """x_t of a rectified flow; t [B]."""
    t = t.view(-1, 1, 1, 1, 1)
    return (1 - t) * clean + t * noise


def train(model: WanModel | Experts, data, folder, steps, batch=16, kept=None, muon_lr=2e-3, lr=1e-3,
          decay=0.998, dropout=0.1, shift=SHIFT, compiled=False, seed=0, seconds=None, device="cpu", shard=False,
          log=print):  # fmt: skip
    """Train model by flow matching on a Data; returns (moving average of the weights, history).

    kept: (frames, rows, columns) of patches of each clip that a step looks at, see data.some_places. decay: of the
    moving average. dropout: share of empty captions, which guidance needs. shift: of the times, see `times`. compiled:
    see models.compile_blocks.
    """
    train_dense(model)
    if compiled:
        compile_blocks(model)
    wrapped = engine.parallel(model, shard)
    average = optim.Average(model)
    optimizer = optim.Both(model, muon_lr, lr, optim.in_blocks)

    def step_of(step):
        random = engine.generator(seed, step)
        clean, told = data_module.batch(data, batch, random, dropout, kept, device)
        noise = torch.randn(clean.shape, generator=random).to(device)
        t = times(batch, random, shift).to(device)
        with precision.autocast(device):
            velocity = wrapped(mix(clean, noise, t), 1000 * t, **told)
        loss = (velocity.float() - (noise - clean)).square().mean()
        loss.backward()
        norm = optimizer.step(optim.schedule(step, steps))
        average.follow(model, min(decay, (1 + step) / (10 + step)))
        return {"loss": loss.item(), "gradient": norm}

    parts = {"model": model, "optimizer": optimizer, "average": average}
    history = engine.run(step_of, parts, folder, steps, seconds, log=log)
    return average.copy_into(model), history


@torch.inference_mode()
def sample(model_at, x, both, steps: int, guidance: float = GUIDANCE, shift: float = SHIFT, done=lambda: None):
    """Latents of noise x [B, 16, T, H, W] by Euler's method with classifier-free guidance.

    model_at: callable (time) -> WanModel. both: [2 B, tokens, text_dim] or a Text of it, the prompts and then the empty
    one. shift: of the times. done: called after each step.
    """
    at = shifted(torch.linspace(1, 0, steps + 1), shift).tolist()
    for now, after in itertools.pairwise(at):
        time = torch.full((2 * len(x),), 1000 * now, device=x.device)
        wanted, unwanted = model_at(now)(torch.cat([x, x]), time, both).chunk(2)
        x = x + (after - now) * (unwanted + guidance * (wanted - unwanted))
        done()
    return x


@torch.no_grad()
def guided(model, x, t, told, empty, guidance: float):
    """Velocity float32 with classifier-free guidance; t [B] in 0 to 1; told: see data.batch; empty: the empty caption,
    see data.text_rows."""
    if guidance == 1.0:
        return model(x, 1000 * t, **told).float()
    both = {name: torch.cat([told[name], part.expand_as(told[name])]) for name, part in empty.items()}
    if "y" in told:
        both["y"] = torch.cat([told["y"], told["y"]])
    velocity = model(torch.cat([x, x]), 1000 * torch.cat([t, t]), **(told | both))
    wanted, unwanted = velocity.float().chunk(2)
    return unwanted + guidance * (wanted - unwanted)
