"""The rCM schedule and sampler in ComfyUI: a scheduler for KSampler, TurboScheduler and TurboSampler."""

import logging

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from comfy.k_diffusion.sampling import default_noise_sampler
from comfy_api.latest import io

from ..turbo_core.errors import TurboError
from ..turbo_core.sampler import sample_rcm
from ..turbo_core.schedule import MAX_STEPS, default_sigma_max, rcm_sigmas
from .blocks import log_once, wan_network
from .experts import check_experts, split_sigmas
from .inputs import check_channels, check_choice, check_latent, check_number, check_positive, check_sigmas
from .loader import sigma_max_of
from .show import show
from .stages import Stages

SCHEDULER = "turbo_rcm"
MODES = ("SDE", "ODE")


def _scheduler(model_sampling, steps):
    sigma_max = getattr(model_sampling, "rcm_sigma_max", None)
    if sigma_max is None:
        sigma_max = default_sigma_max(16)
        log_once(
            f"{SCHEDULER} starts at sigma_max {sigma_max:.0f}, right for text-to-video: this model is not from "
            "TurboLoader or its sampling was replaced (ModelSamplingSD3, not needed). Image-to-video wants 200: use "
            "TurboSampler or TurboScheduler, which ask the model itself."
        )
    try:
        return rcm_sigmas(steps, sigma_max).float()
    except TurboError as error:
        raise TurboError(f"{error} With denoise below 1, KSampler asks for steps / denoise.") from None


def register_scheduler():
    """Offer `turbo_rcm` wherever the host lists schedulers, KSampler among them."""
    comfy.samplers.SCHEDULER_HANDLERS[SCHEDULER] = comfy.samplers.SchedulerHandler(_scheduler)
    if SCHEDULER not in comfy.samplers.SCHEDULER_NAMES:
        comfy.samplers.SCHEDULER_NAMES.append(SCHEDULER)


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


class TurboScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TurboScheduler",
            display_name="Turbo Scheduler",
            category="model/sampling/schedulers",
            description="Sigmas of an rCM-distilled model, for SamplerCustom with the lcm sampler (the original's "
            "default) or euler (its ODE mode).",
            search_aliases=["rCM", "TurboWan", "sigmas"],
            inputs=[
                io.Int.Input("steps", default=4, min=1, max=MAX_STEPS, tooltip="4 is best, 1 is fastest."),
                _sigma_max_input(),
                io.Model.Input("model", optional=True, tooltip="Tells T2V from I2V where sigma_max is 0."),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def execute(cls, steps, sigma_max, model=None) -> io.NodeOutput:
        return io.NodeOutput(sigmas_of(steps, sigma_max, model))


def _sigma_max_input():
    return io.Float.Input(
        "sigma_max",
        default=0.0,
        min=0.0,
        max=1600.0,
        step=1.0,
        tooltip="Noise level of the first step. 0: what the model was distilled with, 80 for T2V and 200 for I2V. "
        "Higher (up to 1600) is sharper and less varied.",
    )


def sigmas_of(steps, sigma_max, model):
    if model is not None:
        wan_network(model, "TurboScheduler")
    default = default_sigma_max(16) if model is None else sigma_max_of(model.model)
    return rcm_sigmas(steps, sigma_max or default).float()


class TurboSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TurboSampler",
            display_name="Turbo Sampler",
            category="model/sampling",
            description="Samples a TurboWan model in 1 to 4 steps. With two experts (Wan 2.2 A14B) it changes from the "
            "high-noise to the low-noise model at the boundary sigma, one noise stream running through.",
            search_aliases=["rCM", "TurboWan", "TurboDiffusion", "KSampler"],
            inputs=[
                io.Model.Input("model", tooltip="The model, or the high-noise expert of A14B."),
                io.Conditioning.Input(
                    "positive", tooltip="The prompt. There is no negative one: guidance is distilled in."
                ),
                io.Latent.Input("latent_image", tooltip="An empty video latent, or what WanImageToVideo gives."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of all noise, that of the later steps too. The same seed gives the same video.",
                ),
                io.Int.Input("steps", default=4, min=1, max=MAX_STEPS, tooltip="4 is best, 1 is fastest."),
                _sigma_max_input(),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    tooltip="SDE: fresh noise at each step, the original's default. ODE: sharper, less robust.",
                ),
                io.Float.Input(
                    "boundary",
                    default=0.9,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="The low-noise expert takes over at the first step whose sigma is below this.",
                ),
                io.Model.Input("model_low", optional=True, tooltip="The low-noise expert of A14B."),
                io.Sigmas.Input("sigmas", optional=True, tooltip="Takes the place of steps and sigma_max."),
            ],
            outputs=[io.Latent.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, positive, latent_image, seed, steps, sigma_max, mode="SDE", boundary=0.9, model_low=None,
        sigmas=None,
    ) -> io.NodeOutput:  # fmt: skip
        wan_network(model, "TurboSampler")
        if sigmas is None:
            sigmas = sigmas_of(steps, sigma_max, model)
        check_sigmas(sigmas)
        check_choice("mode", mode, MODES)
        check_number("boundary", boundary, 0, 1)
        experts = [(model, sigmas)]
        if model_low is not None:
            wan_network(model_low, "TurboSampler")
            check_experts(model, model_low)
            experts = split_sigmas(model, model_low, sigmas, boundary)
        stages = Stages(model.load_device)
        latent = sample_experts(experts, positive, latent_image, seed, mode == "ODE", stages)
        logging.info("TurboSampler: %s", stages.line())
        show(cls, stages.line())
        return io.NodeOutput(latent)


NODES = [TurboScheduler, TurboSampler]
