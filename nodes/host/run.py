"""A sampling run of the host with one expert or two."""

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from comfy.k_diffusion.sampling import default_noise_sampler

from ...turbo_core.sampler import sample_rcm
from ...turbo_core.schedule import default_sigma_max, rcm_sigmas
from .blocks import wan_network
from .inputs import check_channels, check_latent, check_number, check_positive
from .loading import sigma_max_of


class Relay:
    """A sampler function that carries the state and one noise stream from one expert's run to the next."""

    def __init__(self, ode, stages=None):
        self.ode, self.stages, self.x, self.noise = ode, stages, None, None

    def __call__(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        if self.x is None:
            seed = (extra_args or {}).get("seed")
            # on a CPU the host's sampler adds one, which the highest seed of the node has no room for
            self.x, self.noise = x, default_noise_sampler(x, None if seed is None else seed % 0xFFFFFFFFFFFFFFFF)
        if self.stages is not None:
            model = self.stages.timed(model)
        self.x = sample_rcm(model, self.x.to(x), sigmas, extra_args, callback, disable, self.ode, self.noise)
        return self.x


class GuidedRun:
    """One run on a latent, under the host's own guider: loading, offload, hooks and interrupt are the host's.

    latent: LATENT dict; model: the MODEL that its channels and the preview follow; total: steps of all parts.
    Raises TurboError for a prompt or a latent that is empty or made for another model.
    """

    def __init__(self, model, positive, latent, seed, total):
        check_positive(positive, model)
        check_latent(latent)
        check_number("seed", seed, -(2**63), 2**64 - 1)
        ratios = latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
        self.image = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *ratios)
        check_channels("latent_image", self.image.shape[1], model)
        self.noise = comfy.sample.prepare_noise(self.image, seed, latent.get("batch_index"))
        self.preview = latent_preview.prepare_callback(model, total)
        self.positive, self.latent, self.seed, self.total, self.done = positive, latent, seed, total, 0

    def sample(self, model, function, sigmas):
        """The next part of the steps, by a sampler function of k-diffusion's signature. Returns its latent."""
        done = self.done
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": self.positive})  # guidance is distilled away: no negative, CFG 1
        self.done += len(sigmas) - 1
        return guider.sample(
            self.noise,
            self.image,
            comfy.samplers.KSAMPLER(function),
            sigmas,
            denoise_mask=self.latent.get("noise_mask"),
            callback=lambda step, x0, x, _: self.preview(done + step, x0, x, self.total),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=self.seed,
        )

    def packed(self, samples):
        """The LATENT dict with these samples, where and as the host keeps what goes between nodes."""
        kept = {k: v for k, v in self.latent.items() if not k.startswith("downscale_ratio")}
        management = comfy.model_management
        place = {"device": management.intermediate_device(), "dtype": management.intermediate_dtype()}
        return {**kept, "samples": samples.to(**place)}


def sample_experts(experts, positive, latent, seed, ode=False, stages=None):
    """Sample through one or two experts.

    experts: [(MODEL, its sigmas)], the last sigma of one being the first of the next. latent: LATENT dict.
    stages: a Stages that times the steps. Returns a LATENT dict.
    """
    run = GuidedRun(experts[0][0], positive, latent, seed, sum(len(sigmas) - 1 for _, sigmas in experts))
    relay = Relay(ode, stages)
    for model, sigmas in experts:
        samples = run.sample(model, relay, sigmas)
    return run.packed(samples)


def sigmas_of(steps, sigma_max, model):
    if model is not None:
        wan_network(model, "TurboScheduler")
    default = default_sigma_max(16) if model is None else sigma_max_of(model.model)
    return rcm_sigmas(steps, sigma_max or default).float()
