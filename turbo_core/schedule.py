"""The rCM timestep schedule: pure mathematics."""

import math
from numbers import Real

import torch

from .errors import TurboError

MAX_STEPS = 4  # at whose times the student was distilled
MOST_STEPS = 100  # that are computed: those above MAX_STEPS lie between its times
_MID_TIMES = (1.5, 1.4, 1.0)  # TrigFlow angles at which the student was distilled


def default_sigma_max(in_dim: int) -> float:
    """Sigma of the first step: 80 for text-to-video, 200 for the 36-channel image-to-video experts."""
    return 200.0 if in_dim == 36 else 80.0


def _is_finite_number(x):
    return isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x)


def untrained(steps: int) -> str | None:
    """What to tell of more steps than a student was distilled for, in a sentence; None for fewer."""
    if steps <= MAX_STEPS:
        return None
    return (
        f"{steps} steps: TurboWan models are distilled for {MAX_STEPS} at most. More lie between their times, which "
        f"were not trained, and take longer: {MAX_STEPS} are enough."
    )


def rcm_sigmas(steps: int, sigma_max: float = 80.0) -> torch.Tensor:
    """Rectified-flow sigmas of an rCM-distilled model.

    The TrigFlow angles are [atan(sigma_max), 1.5, 1.4, 1.0, 0], fewer steps drop from the end of the middle three;
    sin / (cos + sin) turns an angle into the sigma (and timestep / 1000) that Wan and ComfyUI use. More than four, for
    which no model was distilled, divide the gaps between the angles evenly: eight are the four with one more in each.

    steps: 1 to 4, at most 100. sigma_max: above tan(1.5) = 14.1; 80 for T2V, 200 for I2V, up to 1600 for less variety.
    Returns [steps + 1] float64, descending, last one 0. Raises TurboError outside those ranges.
    Source: TurboDiffusion inference scripts; rCM, arXiv 2510.08431.
    """
    if not _is_finite_number(steps) or steps not in range(1, MOST_STEPS + 1):
        raise TurboError(
            f"TurboWan models are distilled for 1 to {MAX_STEPS} steps and sampled in {MOST_STEPS} at most, got "
            f"{steps}: set steps to 4 (best) down to 1."
        )
    if not _is_finite_number(sigma_max) or sigma_max <= math.tan(_MID_TIMES[0]):
        raise TurboError(
            f"sigma_max must be a finite number above {math.tan(_MID_TIMES[0]):.1f}, got {sigma_max}: "
            "use 80 for text-to-video, 200 for image-to-video, up to 1600."
        )
    steps = int(steps)
    if steps <= MAX_STEPS:
        angles = [math.atan(sigma_max), *_MID_TIMES[: steps - 1], 0.0]
    else:
        known = [math.atan(sigma_max), *_MID_TIMES, 0.0]
        places = [MAX_STEPS * step / steps for step in range(steps)]
        angles = [known[int(p)] + (p - int(p)) * (known[int(p) + 1] - known[int(p)]) for p in places] + [0.0]
    angles = torch.tensor(angles, dtype=torch.float64)
    return angles.sin() / (angles.cos() + angles.sin())
