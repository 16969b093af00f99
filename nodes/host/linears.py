"""A linear layer's call as hosts of any age make it: newer ones with an activation before it and a sum after it."""

import functools
import inspect

import comfy.ops
import torch

from ...turbo_core.errors import TurboError
from ...turbo_core.int8.layout import activated, added
from .settings import log_once

EXTRAS = ("input_act", "act_weight", "residual", "residual_scale")  # what follows the input, in this order


@functools.cache
def extras_of(function) -> frozenset:
    """The names in a signature; a host that hands linears more than their input has them there."""
    return frozenset(inspect.signature(function).parameters)


def takes_activation() -> bool:
    """True where the host hands Wan's ffn.2 the activation before it, so that its hooks see what comes before that."""
    return "input_act" in extras_of(comfy.ops.disable_weight_init.Linear.forward)


def call_linear(forward, input, *given, **named):
    """The host's bound forward(input, ...): what its signature lacks is computed around it.

    A keyword of a newer host that nobody here knows goes to the host's forward, said once in the log. Raises
    TurboError for an activation that neither knows: without it the result would be another one.
    """
    extras = {**dict(zip(EXTRAS, given)), **named}
    extras = {name: value for name, value in extras.items() if value is not None}
    if not extras:
        return forward(input)
    unknown = len(given) > len(EXTRAS) or extras.keys() - EXTRAS
    if unknown:
        log_once(f"this ComfyUI hands linear layers {sorted(extras)}: more than TurboWan knows, its own forward runs")
    if unknown or extras.keys() <= extras_of(forward.__func__):
        return forward(input, *given, **named)
    act, weight = extras.get("input_act"), extras.get("act_weight")
    if act == "rms_norm" and isinstance(weight, torch.nn.Module):
        x = weight(input)  # a norm of the host, whose weight may lie elsewhere
    else:
        x = activated(input, act, weight)
    if x is NotImplemented:
        raise TurboError(
            f"a linear layer is to apply the activation {act!r}, which this ComfyUI lacks: update ComfyUI."
        )
    return added(forward(x), extras.get("residual"), extras.get("residual_scale"))
