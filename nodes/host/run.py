"""A sampling run of the host with one model, or with the two experts of Wan 2.2 A14B."""

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from comfy.k_diffusion.sampling import default_noise_sampler

from ...turbo_core.sampler import sample_rcm
from .inputs import MAX_SEED, check_channels, check_experts, check_latent, check_number, check_positive
from .loading import file_name

MODES = ("SDE", "ODE")  # how a run goes from step to step


class Relay:
    """A sampler function that carries the state and one noise stream from one expert's run to the next."""

    def __init__(self, ode, stages=None):
        self.ode, self.stages, self.x, self.noise = ode, stages, None, None

    def __call__(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
        if self.x is None:
            seed = (extra_args or {}).get("seed")
            # on a CPU the host's sampler adds one, which the highest seed of the node has no room for
            self.x, self.noise = x, default_noise_sampler(x, None if seed is None else seed % MAX_SEED)
        if self.stages is not None:
            model = self.stages.timed(model)
        self.x = sample_rcm(model, self.x.to(x), sigmas, extra_args, callback, disable, self.ode, self.noise)
        return self.x


class GuidedRun:
    """One run on a latent, under the host's own guider: loading, offload, hooks and interrupt are the host's.

    latent: LATENT dict; model: the MODEL that its channels and the preview follow; total: steps of all parts.
    previewed=False leaves the bar alone: the page shows a preview in the place of the picture that a node gives out.
    Raises TurboError for a prompt or a latent that is empty or made for another model.
    """

    def __init__(self, model, positive, latent, seed, total, previewed=True):
        check_positive(positive, model)
        check_latent(latent)
        check_number("seed", seed, -(2**63), MAX_SEED)
        ratios = latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal")
        self.image = comfy.sample.fix_empty_latent_channels(model, latent["samples"], *ratios)
        check_channels("latent_image", self.image.shape[1], model)
        self.noise = comfy.sample.prepare_noise(self.image, seed, latent.get("batch_index"))
        self.preview = latent_preview.prepare_callback(model, total) if previewed else _bar(total)
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


def _bar(total):
    """What the host's prepare_callback gives where previews are off."""
    bar = comfy.utils.ProgressBar(total)
    return lambda step, x0, x, steps: bar.update_absolute(step + 1, steps)


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


def experts_of(high, low, sigmas, boundary):
    """[(MODEL, its sigmas)]: high while sigma >= boundary, low from the first step below it; all for high without low.

    Raises TurboError when the two cannot be the high-noise and the low-noise expert of one family.
    """
    if low is None:
        return [(high, sigmas)]
    check_experts(_facts(high), _facts(low), file_name(high), file_name(low))
    below = (sigmas[:-1] < boundary).tolist()  # in the sigmas' own float32: 0.9 is not below 0.9
    first_low = below.index(True) if True in below else len(below)
    parts = [(high, sigmas[: first_low + 1]), (low, sigmas[first_low:])]
    return [(model, part) for model, part in parts if len(part) > 1]


def _facts(model):
    config = model.model.model_config.unet_config
    return {name: config.get(name) for name in ("model_type", "dim", "ffn_dim", "num_layers", "in_dim", "text_dim")}
