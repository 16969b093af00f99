"""The two experts of Wan 2.2 A14B: which takes which step, and whether they belong together."""

import os

from ...turbo_core.errors import TurboError
from .loading import SOURCE


def split_sigmas(high, low, sigmas, boundary):
    """[(expert, its sigmas)]: high while sigma >= boundary, low from the first step below it."""
    steps = sigmas[:-1].tolist()
    first_low = next((i for i, sigma in enumerate(steps) if sigma < boundary), len(steps))
    parts = [(high, sigmas[: first_low + 1]), (low, sigmas[first_low:])]
    return [(model, part) for model, part in parts if len(part) > 1]


def _facts(model):
    config = model.model.model_config.unet_config
    return {name: config.get(name) for name in ("model_type", "dim", "ffn_dim", "num_layers", "in_dim", "text_dim")}


def _file(model):
    source = model.get_attachment(SOURCE)
    return "" if source is None else os.path.basename(str(source.path))


def check_experts(high, low):
    """Raise TurboError when the two MODELs cannot be the high and low expert of one family."""
    ours, theirs = _facts(high), _facts(low)
    if ours != theirs:
        differ = ", ".join(f"{name} {ours[name]} / {theirs[name]}" for name in ours if ours[name] != theirs[name])
        raise TurboError(
            f"model ({_file(high) or 'high-noise'}) and model_low ({_file(low) or 'low-noise'}) are of different "
            f"families ({differ}): connect the two experts of the same Wan 2.2 A14B model."
        )
    names = _file(high).lower(), _file(low).lower()
    if "low" in names[0] and "high" not in names[0] and "high" in names[1]:
        raise TurboError(
            f"the experts look swapped: model is {_file(high)}, model_low is {_file(low)}: exchange the two."
        )
