"""How a MODEL attends to itself: the settings in its options, and what of them holds for one block at one step."""

import functools
import logging

import torch

from ...turbo_core.sla import HEAD_DIMS, sparse_linear_attention

OPTIONS = "turbowan_attention"  # key of the settings in transformer_options
DEFAULTS = {
    "mode": "sparse-linear",
    "topk": 0.1,
    "coverage": None,  # in place of topk, see turbo_core.sla
    "precision": "bf16",
    "sigma_start": None,  # None: no limit, and no comparison in the model's forward
    "sigma_end": None,
    "dense_blocks": frozenset(),
    "min_tokens": 0,
    "verbose": False,
}
_SIGMA = "turbowan_sigma"  # of one evaluation, in its options: (sigmas, the largest of them)


@functools.cache
def log_once(message):
    logging.info("TurboWan: %s", message)


@torch.compiler.disable  # the host's compile node guards nothing that is read from transformer_options: it would freeze
def active_settings(transformer_options, tokens, head_dim, defaults=DEFAULTS):
    """The settings for this block and step, or None where attention is to be dense."""
    settings = transformer_options.get(OPTIONS, defaults)
    if settings is None or settings["mode"] == "dense":
        return None
    if head_dim not in HEAD_DIMS:
        log_once(f"dense attention, because head_dim {head_dim} is not 64 or 128")
        return None
    block = transformer_options.get("block_index")
    reason = None
    if block in settings["dense_blocks"]:
        reason = f"block {block} is in dense_blocks"
    elif tokens < settings["min_tokens"]:
        reason = f"{tokens} tokens are fewer than min_tokens {settings['min_tokens']}"
    elif settings["sigma_start"] is not None or settings["sigma_end"] is not None:
        sigma = _sigma(transformer_options)
        start, end = settings["sigma_start"], settings["sigma_end"]
        if (start is not None and sigma > start) or (end is not None and sigma < end):
            reason = f"sigma {sigma:.4f} is outside start_percent..end_percent"
    if reason is None:
        return settings
    if settings["verbose"]:
        log_once(f"dense attention where {reason}")
    return None


def with_sigma(transformer_options):
    """The options of one evaluation with its sigma read, where the settings ask for it: no block has to wait for it."""
    options, settings = dict(transformer_options), transformer_options[OPTIONS]
    asked = settings["sigma_start"] is not None or settings["sigma_end"] is not None
    if asked and settings["mode"] != "dense" and "sigmas" in options:
        _sigma(options)
    return options


def _sigma(transformer_options):
    """The largest sigma of this evaluation, read from the device once: each read waits for it.

    Where nothing has read it before the blocks, as in a forward of the network alone, the first block does.
    """
    sigmas = transformer_options["sigmas"]
    known = transformer_options.get(_SIGMA)
    if known is None or known[0] is not sigmas:
        known = transformer_options[_SIGMA] = sigmas, float(sigmas.max())
    return known[1]


def attend(q, k, v, weight, bias, settings):
    """Sparse-linear attention [B, L, H, D] under these settings; weight and bias are those of proj_l, or None."""
    given = {"precision": settings["precision"], "coverage": settings["coverage"]}
    return sparse_linear_attention(q, k, v, weight, bias, settings["topk"], **given)
