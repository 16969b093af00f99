from itertools import pairwise

import numpy as np
import pytest
import torch

from turbo_core.sampler import sample_rcm
from turbo_core.schedule import rcm_sigmas

SHAPE = (2, 3, 2, 4, 5)  # batch > 1, and a video latent's five axes


def toy(x, sigma, gain=1.0):
    """A nonlinear denoiser that depends on sigma and mixes tokens; torch or numpy, whichever comes."""
    xp = torch if torch.is_tensor(x) else np
    sigma = sigma.reshape(-1, 1, 1, 1, 1)
    return gain * (xp.tanh(x) * (1 - sigma) + 0.3 * sigma * xp.sin(3 * x) + 0.1 * x.mean())


def noise(seed, dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rewrite(x, sigmas, ode, noises=(), gain=1.0, see=lambda x: x):
    """The two update rules once more, in numpy float64 and written with the velocity v as published.

    see: what the model is shown of the float64 state.
    """
    noises = list(noises)
    for t, t_next in pairwise(sigmas):
        x0 = see(toy(see(x), np.full(SHAPE[0], t), gain))
        v = (x - x0) / t
        if ode:
            x = x - (t - t_next) * v
        else:
            x = (1 - t_next) * (x - t * v) + (t_next * noises.pop(0) if t_next > 0 else 0)
    assert not noises
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("ode", [False, True], ids=["sde", "ode"])
def test_against_a_float64_rewrite(steps, ode):
    sigmas = rcm_sigmas(steps, 80)
    x, fresh = sigmas[0] * noise(0), [noise(1 + i) for i in range(steps - 1)]
    feed = iter(fresh)
    out = sample_rcm(toy, x, sigmas, {"gain": 1.7}, ode=ode, noise_sampler=lambda *_: next(feed))
    expected = rewrite(x.numpy(), sigmas.numpy(), ode, [] if ode else [n.numpy() for n in fresh], gain=1.7)
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-13)
    plain = rewrite(x.numpy(), sigmas.numpy(), ode, [] if ode else [n.numpy() for n in fresh])
    assert np.abs(plain - expected).max() > 0.1  # extra_args reached the model and mattered


@pytest.mark.parametrize("ode", [False, True], ids=["sde", "ode"])
def test_half_precision_latents_are_rounded_for_the_model_only(ode):
    # a state kept in bf16 between the steps would lose 0.4 % in each
    sigmas = rcm_sigmas(4, 200)
    x, fresh = noise(0).bfloat16(), [noise(1 + i) for i in range(3)]
    feed, shown = iter(fresh), []

    def model(x, sigma):
        shown.append(x.dtype)
        return toy(x.double(), sigmas[len(shown) - 1].expand(SHAPE[0])).to(x)

    def bf16(a):
        return torch.from_numpy(a).bfloat16().double().numpy()

    out = sample_rcm(model, x, sigmas, ode=ode, noise_sampler=lambda *_: next(feed))
    assert out.dtype == torch.bfloat16 and shown == [torch.bfloat16] * 4
    expected = rewrite(x.double().numpy(), sigmas.numpy(), ode, [] if ode else [n.numpy() for n in fresh], see=bf16)
    np.testing.assert_array_equal(out.double().numpy(), bf16(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_input_dtype_is_kept_and_input_left_alone(dtype):
    x = noise(0, torch.float32).to(dtype)
    before = x.clone()
    out = sample_rcm(toy, x, rcm_sigmas(3, 80))
    assert out.dtype == dtype and out.shape == x.shape and torch.isfinite(out).all()
    assert torch.equal(x, before)


@pytest.mark.parametrize("steps", [1, 4])
def test_ode_lands_on_the_data_when_the_path_is_straight(steps):
    data, start = noise(0), noise(1)
    sigmas = rcm_sigmas(steps, 80)
    x = (1 - sigmas[0]) * data + sigmas[0] * start
    visited = []
    out = sample_rcm(lambda x, sigma: data, x, sigmas, callback=lambda d: visited.append(d["x"]), ode=True)
    torch.testing.assert_close(out, data, rtol=0, atol=0)
    for state, sigma in zip(visited, sigmas):  # and every state on the way lies on the line
        torch.testing.assert_close(state, (1 - sigma) * data + sigma * start, rtol=0, atol=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_fresh_noise_is_drawn_between_steps_in_order_and_not_after_the_last(steps):
    sigmas = rcm_sigmas(steps, 80)
    events = []

    def model(x, sigma):
        assert sigma.shape == (SHAPE[0],) and sigma.dtype == x.dtype
        events.append(("model", sigma[0].item()))
        return torch.zeros_like(x)

    def draw(sigma, sigma_next):
        events.append(("noise", sigma, sigma_next))
        return torch.full(SHAPE, float(len(events)))

    states = []
    sample_rcm(model, noise(0), sigmas, callback=lambda d: states.append(d["x"]), noise_sampler=draw)
    s = sigmas.tolist()
    expected = [("model", s[0])]
    for i in range(1, steps):
        expected += [("noise", s[i - 1], s[i]), ("model", s[i])]
    assert events == expected
    for i, state in enumerate(states[1:], 1):  # with x0 = 0 a state is its noise alone: each draw was used once
        torch.testing.assert_close(state, torch.full_like(state, s[i] * 2 * i))


def test_ode_draws_no_noise():
    def draw(*_):
        raise AssertionError("the ODE is deterministic")

    assert torch.isfinite(sample_rcm(toy, noise(0), rcm_sigmas(4, 80), ode=True, noise_sampler=draw)).all()


def test_callback_gets_each_step_as_the_host_expects_it():
    sigmas, seen, outputs = rcm_sigmas(4, 80), [], []

    def model(x, sigma):
        outputs.append(toy(x, sigma))
        return outputs[-1]

    x = noise(0, torch.float32)
    sample_rcm(model, x, sigmas, None, seen.append, True)
    assert [d["i"] for d in seen] == [0, 1, 2, 3]
    assert [d["sigma"] for d in seen] == sigmas[:-1].tolist() == [d["sigma_hat"] for d in seen]
    assert all(d["denoised"] is out for d, out in zip(seen, outputs))
    assert torch.equal(seen[0]["x"], x)


def test_same_generator_same_video():
    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return sample_rcm(
            toy, noise(0), rcm_sigmas(4, 80), noise_sampler=lambda *_: torch.randn(SHAPE, generator=generator)
        )

    assert torch.equal(run(5), run(5)) and not torch.allclose(run(5), run(6))


def test_default_noise_is_normal_and_different_in_every_step():
    torch.manual_seed(3)
    states = []
    x = torch.zeros(2, 4096)
    sigmas = rcm_sigmas(4, 80)
    sample_rcm(lambda x, s: torch.zeros_like(x), x, sigmas, callback=lambda d: states.append(d["x"]))
    draws = torch.stack([state / s for state, s in zip(states[1:], sigmas[1:])]).flatten(1)
    assert (draws.std(1) - 1).abs().max() < 0.05 and draws.mean(1).abs().max() < 0.05
    assert (draws.corrcoef() - torch.eye(3)).abs().max() < 0.05


def test_no_graph_is_kept():
    x = noise(0).requires_grad_()
    assert not sample_rcm(toy, x, rcm_sigmas(2, 80)).requires_grad
