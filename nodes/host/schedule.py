"""The rCM schedule in the host: `turbo_rcm` in its lists of schedulers, and sigmas that suit a MODEL."""

import functools

import comfy.model_sampling
import comfy.samplers

from ...turbo_core.errors import TurboError
from ...turbo_core.schedule import default_sigma_max, rcm_sigmas
from .inputs import check_sigmas

SCHEDULER = "turbo_rcm"
_TEXT_TO_VIDEO = 16  # input channels


def sigma_max_of(model):
    """Sigma of the first step that an rCM model with these input channels was distilled for."""
    return default_sigma_max(model.model_config.unet_config.get("in_dim"))


def mark_sigma_max(model):
    """Leave it where the scheduler of a plain KSampler finds it, which sees nothing but model_sampling."""
    model.model_sampling.rcm_sigma_max = sigma_max_of(model)


def sigmas_of(steps, sigma_max, model, given=None):
    """The sigmas that were given, or else the rCM schedule [steps + 1]; sigma_max 0 is what the MODEL was made for.

    Raises TurboError for what is no schedule.
    """
    if given is not None:
        check_sigmas(given)
        return given
    default = default_sigma_max(_TEXT_TO_VIDEO) if model is None else sigma_max_of(model.model)
    return rcm_sigmas(steps, sigma_max or default).float()


def _scheduler(model_sampling, steps, tell):
    if not isinstance(model_sampling, comfy.model_sampling.CONST):
        raise TurboError(f"{SCHEDULER} is for flow models such as Wan, this is {type(model_sampling).__name__}.")
    sigma_max, notes = getattr(model_sampling, "rcm_sigma_max", None), []
    if sigma_max is None:
        sigma_max = default_sigma_max(_TEXT_TO_VIDEO)
        notes.append(
            f"{SCHEDULER} starts at sigma_max {sigma_max:.0f}, right for text-to-video: this model is not from "
            "TurboLoader or its sampling was replaced (ModelSamplingSD3, not needed). Image-to-video wants 200: use "
            "TurboSampler or TurboScheduler, which ask the model itself."
        )
    tell(SCHEDULER, steps, *notes)
    try:
        return rcm_sigmas(steps, sigma_max).float()
    except TurboError as error:
        raise TurboError(f"{error} With denoise below 1, KSampler asks for steps / denoise.") from None


def register_scheduler(tell):
    """Offer `turbo_rcm` wherever the host lists schedulers, KSampler among them; tell(name, steps, *notes) before each
    use."""
    handler = functools.partial(_scheduler, tell=tell)
    comfy.samplers.SCHEDULER_HANDLERS[SCHEDULER] = comfy.samplers.SchedulerHandler(handler)
    if SCHEDULER not in comfy.samplers.SCHEDULER_NAMES:
        comfy.samplers.SCHEDULER_NAMES.append(SCHEDULER)
