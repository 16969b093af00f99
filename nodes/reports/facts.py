"""What a MODEL is, in words: family, weight formats, attention, memory."""

import collections

import comfy.ldm.modules.attention
import comfy.ldm.wan.model as wan
from comfy.quant_ops import QuantizedTensor

from ...turbo_core.files import human_bytes
from ...turbo_core.int8 import layout
from ...turbo_core.wan import QUANTIZED_LINEARS
from ..host.blocks import has_trained_sla
from ..host.loading import SOURCE, file_name
from ..host.ops import ROW
from ..host.override import OVERRIDE
from ..host.settings import DEFAULTS, OPTIONS

_LAYOUTS = {layout.NAME: "int8_block", ROW: "int8_row", "TensorCoreFP8Layout": "fp8"}


def weight_format(weight) -> str:
    """int8_block, int8_row, fp8, another layout's own name, or the dtype."""
    if isinstance(weight, QuantizedTensor):
        return _LAYOUTS.get(weight._layout_cls, weight._layout_cls)
    return str(weight.dtype).removeprefix("torch.")


def _formats(network):
    modules = dict(network.named_modules())
    linears = [modules.get(f"blocks.{i}.{name}") for i in range(len(network.blocks)) for name in QUANTIZED_LINEARS]
    count = collections.Counter(weight_format(m.weight) for m in linears if hasattr(m, "weight"))
    return ", ".join(f"{kind} in {number}" for kind, number in count.most_common())


def _name(model, network):
    source = model.get_attachment(SOURCE)
    if source is not None:
        return f"{source.family} ({file_name(model)})"
    return f"{type(model.model).__name__} (dim {network.dim}, {len(network.blocks)} blocks)"


def attention_text(model, network) -> str:
    """How this MODEL's self-attention is set, as a person would say it."""
    options = model.model_options["transformer_options"]
    trained = has_trained_sla(network)
    settings = options.get(OPTIONS, DEFAULTS if trained else None)
    if settings is None or settings["mode"] == "dense":
        own = settings is None and options.get(OVERRIDE) is not None
        return "dense, by another node's override" if own else f"dense, by {host_attention()}"
    linear = trained and settings["mode"] == "sparse-linear"
    kind = "sparse-linear (SLA)" if linear else "sparse, without a linear branch"
    limits = [f"blocks {', '.join(map(str, sorted(settings['dense_blocks'])))} dense"] * bool(settings["dense_blocks"])
    limits += [f"dense below {settings['min_tokens']} tokens"] * bool(settings["min_tokens"])
    limits += ["part of the sigmas only"] * (settings["sigma_start"] is not None or settings["sigma_end"] is not None)
    as_trained = [] if OPTIONS in options else ["no Sparse Low-Bit Attention node: the default"]
    coverage = settings["coverage"]
    kept = f"top-k {settings['topk']:g}" if coverage is None else f"cumulative score to {coverage:g}"
    return ", ".join([kind, kept, settings["precision"], *limits, *as_trained])


def host_attention() -> str:
    """The host's attention function, as its own log names it."""
    return comfy.ldm.modules.attention.optimized_attention.__name__.removeprefix("attention_")


def summary(model) -> str:
    """One line: the file, the formats of its linears, its attention."""
    network = model.model.diffusion_model
    return f"{_name(model, network)}; {_formats(network)}; {attention_text(model, network)}"


def model_facts(model) -> list[tuple[str, str]]:
    """[(item, finding)] about a MODEL of any kind."""
    network = model.model.diffusion_model
    size, loaded = model.model_size(), model.loaded_size()
    memory = [
        ("weights", f"{human_bytes(size)}, {human_bytes(loaded)} of it on {model.load_device} now"),
        ("computes in", str(model.model.get_dtype_inference()).removeprefix("torch.")),
        ("patched weights", f"{len(model.patches)} (LoRA and the like)" if model.patches else "none"),
    ]
    if not isinstance(network, wan.WanModel):
        return [("family", f"{type(network).__name__}: not a Wan model, the nodes of TurboWan do not take it"), *memory]
    proj_l = "in every block: trained for SLA" if has_trained_sla(network) else "none: not trained for SLA"
    sigma_max = getattr(model.model.model_sampling, "rcm_sigma_max", None)
    schedule = "unknown: not from TurboLoader, or replaced since" if sigma_max is None else f"{sigma_max:g}"
    return [
        ("family", _name(model, network)),
        ("linear layers", _formats(network)),
        ("proj_l", proj_l),
        ("attention", attention_text(model, network)),
        ("rCM sigma_max", schedule),
        *memory,
    ]
