"""The rCM timestep schedule: pure mathematics."""

import math
from numbers import Real

import torch

from .errors import TurboError

MAX_STEPS = 4
_MID_TIMES = (1.5, 1.4, 1.0)  # TrigFlow angles at which the student was distilled


def default_sigma_max(in_dim: int) -> float:
    """Sigma of the first step: 80 for text-to-video, 200 for the 36-channel image-to-video experts."""
    return 200.0 if in_dim == 36 else 80.0


def _is_finite_number(x):
    return isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x)


def rcm_sigmas(steps: int, sigma_max: float = 80.0) -> torch.Tensor:
    """Rectified-flow sigmas of an rCM-distilled model.

    The TrigFlow angles are [atan(sigma_max), 1.5, 1.4, 1.0, 0], fewer steps drop from the end of the middle three;
    sin / (cos + sin) turns an angle into the sigma (and timestep / 1000) that Wan and ComfyUI use.

    steps: 1 to 4. sigma_max: above tan(1.5) = 14.1; 80 for T2V, 200 for I2V, up to 1600 for less variety.
    Returns [steps + 1] float64, descending, last one 0. Raises TurboError outside those ranges.
    Source: TurboDiffusion inference scripts; rCM, arXiv 2510.08431.
    """
    if not _is_finite_number(steps) or steps not in range(1, MAX_STEPS + 1):
        raise TurboError(
            f"TurboWan models are distilled for 1 to {MAX_STEPS} steps, got {steps}: set steps to 4 (best) down to 1."
        )
    if not _is_finite_number(sigma_max) or sigma_max <= math.tan(_MID_TIMES[0]):
        raise TurboError(
            f"sigma_max must be a finite number above {math.tan(_MID_TIMES[0]):.1f}, got {sigma_max}: "
            "use 80 for text-to-video, 200 for image-to-video, up to 1600."
        )
    angles = torch.tensor([math.atan(sigma_max), *_MID_TIMES[: int(steps) - 1], 0.0], dtype=torch.float64)
    return angles.sin() / (angles.cos() + angles.sin())
