"""The same checkpoint, prompt and seed give the same latents in ComfyUI and in the standalone pipeline."""

import pytest
import torch

from tests.helpers.lab import HIGH, STOCK, T2V
from turbo_core import checkpoint, pipeline
from turbo_core.schedule import rcm_sigmas
from turbo_core.wan import WanModel


def seen_timesteps(model):
    """(clone of a MODEL, list that fills with the timesteps its network gets)"""
    seen, model = [], model.clone()

    def note(network, x, timestep, *args, **kwargs):
        seen.append(timestep[0].item())
        return network(x, timestep, *args, **kwargs)

    model.add_wrapper_with_key("diffusion_model", "note", note)
    return model, seen


@pytest.mark.parametrize(
    ("name", "steps", "expected"),
    [
        (T2V, 4, [988.0, 932.0, 852.0, 608.0]),
        (HIGH, 2, [996.0, 932.0]),
    ],
)
def test_a_turbowan_network_sees_the_timesteps_of_its_training(lab, name, steps, expected):
    model, seen = seen_timesteps(lab.load(name))
    lab.turbo(model, steps=steps)
    assert seen == expected


def test_quantizing_keeps_the_timesteps_and_a_stock_model_gets_its_own(lab):
    model, seen = seen_timesteps(lab.quantize(lab.load()))
    lab.turbo(model, steps=1)
    assert seen == [988.0]
    model, seen = seen_timesteps(lab.load(STOCK))
    lab.turbo(model, steps=1)
    assert seen == pytest.approx([987.654], abs=1e-3)


@pytest.mark.parametrize("topk", [0.3, 1.0])
def test_the_sampled_latents_are_those_of_the_pipeline(lab, topk):
    """ODE, whose only noise is the first: both draw it from the seed on the CPU."""
    sigmas = rcm_sigmas(4, 80.0)
    sd, _ = checkpoint.load(lab.path(T2V))
    standalone = WanModel.from_state_dict(sd, torch.float32)
    theirs = pipeline.sample(
        lambda sigma: standalone, lab.context(), lab.shape, sigmas, seed=3, topk=topk, ode=True, device="cpu"
    )
    ours = lab.turbo(lab.attention(lab.load(), topk), mode="ODE", seed=3)
    latent_format = lab.load().model.latent_format
    assert lab.distance(latent_format.process_in(ours), theirs) < 1e-4
