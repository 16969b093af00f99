"""The rCM sampler, with the signature of k-diffusion's samplers."""

import torch

from .devices import widest_float


def _default_noise(x):
    return lambda sigma, sigma_next: torch.randn_like(x)


@torch.no_grad()
def sample_rcm(model, x, sigmas, extra_args=None, callback=None, disable=None, ode=False, noise_sampler=None):
    """Few-step sampling of an rCM-distilled rectified-flow model.

    SDE (default): x = (1 - s') * x0 + s' * fresh noise. ODE: x = x0 + (s' / s) * (x - x0), the Euler step of the
    velocity (x - x0) / s.

    model: callable (x, sigma [B], **extra_args) -> x0, the denoised sample. x: [B, ...], already s0 * noise.
    sigmas: [steps + 1], rectified-flow sigmas, last one 0. callback: called with {"i", "x", "sigma", "sigma_hat",
    "denoised"} after each evaluation. disable: accepted for the signature; progress belongs to the callback.
    noise_sampler: callable (sigma, sigma_next) -> noise like x; default torch.randn_like.
    Returns x of the input's dtype. The state is float64 in between, as in the reference.
    """
    extra_args = extra_args or {}
    noise_sampler = noise_sampler or _default_noise(x)
    dtype = x.dtype
    state_dtype = widest_float(x.device)
    x = x.to(state_dtype)
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1].tolist(), sigmas[1:].tolist())):
        x_in = x.to(dtype)
        denoised = model(x_in, x_in.new_full((x.shape[0],), sigma), **extra_args)
        if callback is not None:
            callback({"i": i, "x": x_in, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
        denoised = denoised.to(state_dtype)
        if ode:
            x = denoised + (sigma_next / sigma) * (x - denoised)
        elif sigma_next > 0:
            x = (1 - sigma_next) * denoised + sigma_next * noise_sampler(sigma, sigma_next).to(x)
        else:
            x = denoised
    return x.to(dtype)
