"""Stage 5: sparse-linear attention, learned from the dense student alone: no clips are needed, only their captions
and, for image-to-video, their first pictures."""

import torch

from ..schedule import MAX_STEPS, default_sigma_max, rcm_sigmas
from . import data as data_module
from . import engine, optim, precision
from .distill import clean_of
from .teacher import mix


def train(model, dense, data, folder, steps, topk=0.15, start=0.5, ramp=0.4, batch=8, sigma_max=None, muon_lr=5e-4,
          lr=1e-3, decay=0.99, seed=0, seconds=None, device="cpu", shard=False, log=print):  # fmt: skip
    """Fine-tune model, which has proj_l, to give the dense student's velocities on its own trajectories.

    topk goes from start to topk over the first `ramp` of the steps. sigma_max: of the first step, default the one the
    student is sampled with. Returns (moving average, history).
    """
    sigmas = rcm_sigmas(MAX_STEPS, sigma_max or default_sigma_max(model.in_dim)).float().tolist()
    engine.spread(dense.requires_grad_(False).eval(), shard)
    wrapped = engine.parallel(model, shard)
    average = optim.Average(model)
    optimizer = optim.Both(model, muon_lr, lr, lambda name, p: optim.in_blocks(name, p) and ".proj_l." not in name)
    shape = (batch, *data.latents.shape[1:])

    def step_of(step):
        random = engine.generator(seed, step)
        _, told = data_module.batch(data, batch, random, device=device)
        kept = start + (topk - start) * min(1.0, step / max(1, ramp * steps))
        count = engine.shared(seed, step, MAX_STEPS)
        with precision.autocast(device):
            x = torch.randn(shape, generator=random).to(device) * sigmas[0]
            for i in range(count):
                at = torch.full((batch,), sigmas[i], device=device)
                if i == count - 1:
                    break
                with torch.no_grad():
                    made = clean_of(model, x, at, told, topk=kept)
                x = mix(made, torch.randn(shape, generator=random).to(device), torch.full_like(at, sigmas[i + 1]))
            with torch.no_grad():
                wanted = dense(x, 1000 * at, **told).float()
            loss = (wrapped(x, 1000 * at, **told, topk=kept).float() - wanted).square().mean()
        loss.backward()
        norm = optimizer.step(optim.schedule(step, steps))
        average.follow(model, min(decay, (1 + step) / (10 + step)))
        return {"loss": loss.item(), "relative": (loss / wanted.square().mean()).item(), "topk": kept, "gradient": norm}

    parts = {"model": model, "optimizer": optimizer, "average": average}
    history = engine.run(step_of, parts, folder, steps, seconds, log=log)
    return average.copy_into(model), history
