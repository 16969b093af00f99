"""A MODEL with attention settings; one without a trained branch is sparse through the host's attention override."""

from ...turbo_core.dispatch import FLOATS
from .blocks import has_trained_sla
from .settings import OPTIONS, active_settings, attend, log_once

OVERRIDE = "optimized_attention_override"
MODES = {"auto": "sparse-linear", "sparse only": "sparse", "dense": "dense"}  # {as the node says: as the settings do}
_LAST = "turbowan_last_self_attention"  # block of the last one, in the options of one evaluation


def with_settings(model, mode, start_percent, end_percent, **settings):
    """A clone of the MODEL that attends by these settings; mode and percents as the node has them."""
    trained = has_trained_sla(model.model.diffusion_model)
    to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    model = model.clone()
    options = model.model_options["transformer_options"]
    options[OPTIONS] = {
        "mode": MODES["sparse only" if mode == "auto" and not trained else mode],
        "sigma_start": to_sigma(start_percent) if start_percent > 0 else None,
        "sigma_end": to_sigma(end_percent) if end_percent < 1 else None,
        **settings,
    }
    if not trained:
        options[OVERRIDE] = training_free(options.get(OVERRIDE))
    return model


def training_free(previous):
    """An attention override for models without proj_l; `previous` is the override that was there, or None."""

    def attention(func, q, k, v, heads, *args, **kwargs):
        settings = None
        options = kwargs.get("transformer_options") or {}
        of_image = kwargs.get("low_precision_attention") is False
        plain = q.ndim == 3 and not args and kwargs.get("mask") is None
        # asked for [B, H, L, D], it is the given function's to answer; it is self-attention all the same
        if plain and _is_self_attention(q, k, options, of_image) and not kwargs.get("skip_output_reshape"):
            settings = active_settings(options, q.shape[1], q.shape[2] // heads, None)
        if settings is not None and q.dtype not in FLOATS:
            log_once(f"dense attention, because q, k and v are {q.dtype}")
            settings = None
        if settings is None:
            return (func if previous is None else lambda *a, **kw: previous(func, *a, **kw))(
                q, k, v, heads, *args, **kwargs
            )
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))
        return attend(q, k, v, None, None, settings).flatten(2)

    return attention


def _is_self_attention(q, k, options, of_image):
    """Cross-attention comes through the override as well: its keys differ in number, or it follows self-attention."""
    block = options.get("block_index")
    if q.shape != k.shape:
        if not of_image:  # attention to an image prompt stands between self-attention and the text
            options.pop(_LAST, None)
        return False
    if block is not None and options.get(_LAST) == block:
        del options[_LAST]
        return False
    options[_LAST] = block
    return True
