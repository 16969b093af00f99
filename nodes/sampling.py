"""The rCM schedule and sampler in ComfyUI: a scheduler for KSampler, TurboScheduler and TurboSampler."""

import logging

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
from comfy_api.latest import io

from ..turbo_core.errors import TurboError
from ..turbo_core.schedule import MAX_STEPS, default_sigma_max, rcm_sigmas
from .host.blocks import log_once, wan_network
from .host.experts import check_experts, split_sigmas
from .host.inputs import check_choice, check_number, check_sigmas
from .host.run import sample_experts, sigmas_of
from .host.stages import Stages
from .reports.show import show

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
