"""A MODEL with attention settings; one without a trained branch is sparse through the host's attention override.

Newer hosts have a child `comfy_attention` in each attention module, and setting that of self-attention would spare the
guess which attention is whose. We do not: the host asks it only where no override is set, so that any node's override,
of cross-attention alone too, would switch ours off without a word. An override that keeps the one before it calls ours.
"""

import functools

import comfy.ldm.modules.attention
from comfy.patcher_extension import WrappersMP

from ...turbo_core.dispatch import FLOATS
from .blocks import has_trained_sla
from .fused import guard_feed_forward
from .settings import OPTIONS, active_settings, attend, log_once, with_sigma

OVERRIDE = "optimized_attention_override"
MODES = {"auto": "sparse-linear", "sparse only": "sparse", "dense": "dense"}  # {as the node says: as the settings do}
_LAST = "turbowan_last_self_attention"  # block of the last one, in the options of one evaluation
_PREFERRED = "turbowan_preferred_attention"  # what files and nodes prefer, in the same place, see _preferences
_REACHED = "turbowan_override_reached"  # filled by our override where another one stands above it
_KEY = "turbowan_attention"  # of our wrapper


def with_settings(model, mode, start_percent, end_percent, tell=log_once, **settings):
    """A clone of the MODEL that attends by these settings; mode and percents as the node has them.

    tell(text) hears, while it samples, how another node's attention override gets on with them.
    """
    trained = has_trained_sla(model.model.diffusion_model)
    to_sigma = model.get_model_object("model_sampling").percent_to_sigma
    model = model.clone()
    options = model.model_options["transformer_options"]
    options[OPTIONS] = {
        "mode": MODES[mode],  # "auto" is each network's own affair: a guider evaluates two by one MODEL's options
        "sigma_start": to_sigma(start_percent) if start_percent > 0 else None,
        "sigma_end": to_sigma(end_percent) if end_percent < 1 else None,
        **settings,
    }
    if not trained:
        options[OVERRIDE] = training_free(options.get(OVERRIDE))
        guard_feed_forward(model.model.diffusion_model)  # of the host's own loader, it may be
    model.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, _KEY)  # of a node like this before it
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, _KEY, _around_evaluation(options.get(OVERRIDE), trained, tell))
    return model


def _around_evaluation(ours, trained, tell):
    """A wrapper of each evaluation: what its blocks need is read before the first of them; overrides are watched.

    ours: the override as the node left it, for models without a trained branch. Options are copied: they are others'.
    """

    @functools.cache
    def say_once(text):
        tell(text)

    def evaluation(executor, *args, **kwargs):
        watched = []

        def noted(given):
            if not isinstance(given, dict) or OPTIONS not in given:
                return given
            given = with_sigma(given)
            preferred = {} if trained else _preferences(getattr(executor.class_obj, "diffusion_model", None))
            if preferred:
                given[_PREFERRED] = preferred
            above, mode = given.get(OVERRIDE), given[OPTIONS]["mode"]
            if mode != "dense" and above is not None and (trained or above is not ours):
                given[_REACHED] = []
                watched.append(given)
            return given

        out = executor(*map(noted, args), **{name: noted(value) for name, value in kwargs.items()})
        for options in watched:
            say_once(_of_another(options[OVERRIDE], trained, bool(options[_REACHED])))
        return out

    return evaluation


def _of_another(override, trained, reached):
    """A line on another node's attention override in the place of, or above, ours."""
    name = getattr(override, "__qualname__", type(override).__qualname__)
    who = f"the attention override {name} (in {getattr(override, '__module__', None) or type(override).__module__})"
    if trained:
        return f"{who} acts on cross-attention alone: self-attention of this model is computed by TurboWan."
    if reached:
        return f"{who} stands above Sparse Low-Bit Attention and passes attention on to it."
    return (
        f"{who} has taken the place of Sparse Low-Bit Attention, whose settings have no effect: put that node before "
        "it, or leave one of them out."
    )


def _preferences(network):
    """{(block, True for self-attention): function} that a file or a node prefers, by the host's comfy_attention.

    The host drops a preference before it calls an override, so that one which declines could not know it.
    """
    found = {}
    for i, block in enumerate(getattr(network, "blocks", ())):
        for name, of_self in (("self_attn", True), ("cross_attn", False)):
            preferred = getattr(getattr(block, name, None), "comfy_attention", None)
            if getattr(preferred, "function", None) is not None:
                found[i, of_self] = preferred.function
    return found


def training_free(previous):
    """An attention override for models without proj_l; `previous` is the override that was there, or None.

    Where it declines, the override before it computes, else what the file or a node prefers, else the given function.
    Its container_function is what hosts call that hand q, k and v over for good: nobody keeps them while it computes.
    """
    previous = getattr(previous, "turbowan_previous", previous)  # of a node like this before it

    def chosen(q, k, heads, args, kwargs):
        """(settings or None, function that is preferred where it declines or None)."""
        options, settings = kwargs.get("transformer_options") or {}, None
        of_image = kwargs.get("low_precision_attention") is False
        plain = q.ndim == 3 and not args and kwargs.get("mask") is None
        of_self = plain and _is_self_attention(q, k, options, of_image)
        if of_self and _REACHED in options:  # one above ours may take self-attention and pass on the rest
            options[_REACHED].append(True)
        # asked for [B, H, L, D], it is the given function's to answer; it is self-attention all the same
        if of_self and not kwargs.get("skip_output_reshape"):
            settings = active_settings(options, q.shape[1], q.shape[2] // heads, None)
        if settings is not None and q.dtype not in FLOATS:
            log_once(f"dense attention, because q, k and v are {q.dtype}")
            settings = None
        given = getattr(kwargs.get("preferred_attention"), "function", None)
        return settings, given or options.get(_PREFERRED, {}).get((options.get("block_index"), of_self))

    def attention(func, q, k, v, heads, *args, **kwargs):
        settings, preferred = chosen(q, k, heads, args, kwargs)
        if settings is not None:
            return _sparse([q, k, v], heads, settings)
        if previous is not None:
            return previous(func, q, k, v, heads, *args, **kwargs)
        return (preferred or func)(q, k, v, heads, *args, **kwargs)

    def from_containers(q, k, v, heads, *args, **kwargs):
        settings, preferred = chosen(q.peek(), k.peek(), heads, args, kwargs)
        if settings is not None:
            return _sparse([t.take() for t in (q, k, v)], heads, settings)
        # the host's own call knows by its keywords that it is inside of an override
        host = comfy.ldm.modules.attention.optimized_attention
        if hasattr(previous, "container_function"):
            return previous.container_function(q, k, v, heads, *args, **kwargs)
        if previous is not None:
            return previous(host, *(t.take() for t in (q, k, v)), heads, *args, **kwargs)
        return (preferred or host)(q, k, v, heads, *args, **kwargs)

    attention.container_function, attention.turbowan_previous = from_containers, previous
    return attention


def _sparse(qkv, heads, settings):
    """Sparse attention of [q, k, v], each [B, L, heads * D], without a linear branch. Empties the list."""
    return attend(*(qkv.pop(0).unflatten(-1, (heads, -1)) for _ in range(3)), None, None, settings).flatten(2)


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
