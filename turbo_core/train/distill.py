"""Stage 4: rCM, a teacher with guidance becomes a student of 1 to 4 steps without.

Consistency (forward): the student's clip at a time agrees with its clip a little further down the teacher's path.
Distribution matching (reverse): what the student makes is pushed from where a network trained on its clips (the fake
score) puts it to where the teacher does. Source: rCM, arXiv 2510.08431; the time step of the consistency is finite
here, which needs no Jacobian-vector product and so no special attention kernel.
"""

import torch

from ..schedule import MAX_STEPS, default_sigma_max, rcm_sigmas
from . import data as data_module
from . import engine, optim, precision
from .models import compile_blocks, train_dense
from .teacher import GUIDANCE, SHIFT, guided, mix, shifted, times

GRID = 24  # finite steps from noise to clip


def train(student, teacher, fake, data, folder, steps, batch=8, kept=None, guidance=GUIDANCE, sigma_max=None,
          shift=SHIFT, alone=0.25, weight=1.0, ahead=3.0, muon_lr=5e-4, lr=2.5e-4, decay=0.99, compiled=False, seed=0,
          seconds=None, device="cpu", shard=False, log=print):  # fmt: skip
    """Distil teacher into student; returns (moving average of the student's weights, history).

    student, teacher, fake: WanModels, or Experts; the teacher is not changed. The fake score should begin with
    the teacher's weights, and the student with those or an earlier student's. alone: share of the steps with
    consistency only, in which the fake score already learns what the student makes. weight: of distribution matching.
    ahead: how many times faster the fake score learns; where it lags behind the student, clips oversaturate and grow a
    grid. sigma_max: of the student's first step, default the one it is sampled with. kept, shift, compiled: see
    teacher.train.
    """
    sigmas = rcm_sigmas(MAX_STEPS, sigma_max or default_sigma_max(student.in_dim)).float().tolist()
    engine.spread(teacher.requires_grad_(False).eval(), shard)
    for model in (student, fake):
        train_dense(model)
    if compiled:
        compile_blocks(student, teacher, fake)
    wrapped, wrapped_fake = engine.parallel(student, shard), engine.parallel(fake, shard)
    average = optim.Average(student)
    optimizer = optim.Both(student, muon_lr, lr, optim.in_blocks)
    fake_optimizer = optim.Both(fake, ahead * muon_lr, ahead * lr, optim.in_blocks)
    empty = data_module.text_rows(data, torch.zeros(1, dtype=torch.long), device)

    def step_of(step):
        random = engine.generator(seed, step)
        clean, told = data_module.batch(data, batch, random, 0.0, kept, device)

        def noise():
            return torch.randn(clean.shape, generator=random).to(device)

        values = {}
        with precision.autocast(device):
            loss = _consistency(wrapped, teacher, clean, noise(), told, empty, guidance, shift, random)
            values["consistency"] = loss.item()
            matching = step >= alone * steps
            count = engine.shared(seed, step, MAX_STEPS)
            with torch.set_grad_enabled(matching):
                made = generate(wrapped, clean.shape, sigmas, told, count, noise)
            if matching:
                push, values["apart"] = _matching(made, teacher, fake, noise(), told, empty, guidance, shift, random)
                loss = loss + weight * push
            loss.backward()
        rate = optim.schedule(step, steps, decay_from=0.7)
        values["gradient"] = optimizer.step(rate)
        average.follow(student, min(decay, (1 + step) / (10 + step)))
        clip, other, t = made.detach(), noise(), times(batch, random, shift).to(device)
        with precision.autocast(device):
            velocity = wrapped_fake(mix(clip, other, t), 1000 * t, **told)
        loss = (velocity.float() - (other - clip)).square().mean()
        loss.backward()
        fake_optimizer.step(rate)
        values["fake"] = loss.item()
        return values

    parts = {
        "model": student,
        "optimizer": optimizer,
        "average": average,
        "fake": fake,
        "fake_optimizer": fake_optimizer,
    }
    history = engine.run(step_of, parts, folder, steps, seconds, log=log)
    return average.copy_into(student), history


def clean_of(model, x, t, told, **options):
    """The clip that a student sees in x at times t [B]: x - t * velocity."""
    return x - t.view(-1, 1, 1, 1, 1) * model(x, 1000 * t, **told, **options).float()


def _consistency(student, teacher, clean, noise, told, empty, guidance, shift, random):
    """Mean square, in units of velocity, between the student at t and the student one teacher's step further."""
    u = torch.rand(len(clean), generator=random).to(clean) * 0.99 + 0.01
    now, after = shifted(u, shift), shifted((u - 1 / GRID).clamp_min(0), shift)
    x = mix(clean, noise, now)
    with torch.no_grad():
        velocity = guided(teacher, x, now, told, empty, guidance)
        further = x - (now - after).view(-1, 1, 1, 1, 1) * velocity
        target = clean_of(student, further, after, told)
        wanted = (x - target) / now.view(-1, 1, 1, 1, 1)
    return (student(x, 1000 * now, **told).float() - wanted).square().mean()


def generate(student, shape, sigmas, told, count: int, noise):
    """The student's clips after `count` of its steps, with a gradient through the last of them."""
    x = noise() * sigmas[0]
    for i, sigma in enumerate(sigmas[:count]):
        at = torch.full((shape[0],), sigma, device=x.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and i == count - 1):
            made = clean_of(student, x, at, told)
        x = mix(made, noise(), torch.full_like(at, sigmas[i + 1]))
    return made


def _matching(made, teacher, fake, noise, told, empty, guidance, shift, random):
    """(loss whose gradient is the difference of the two scores, normalized; mean distance of the two)."""
    with torch.no_grad():
        t = times(len(made), random, shift).to(made).clamp(0.02, 0.98)
        x = mix(made.detach(), noise, t)
        real = guided(teacher, x, t, told, empty, guidance)
        unreal = fake(x, 1000 * t, **told).float()
        at = t.view(-1, 1, 1, 1, 1)
        real, unreal = x - at * real, x - at * unreal
        scale = (made - real).abs().mean((1, 2, 3, 4), keepdim=True).clamp_min(1e-3)
        push = (unreal - real) / scale
    return 0.5 * (made - (made.detach() - push)).square().mean(), (unreal - real).abs().mean().item()
