"""Set-ups that run and do not do what was meant: a sentence each, for the node that can be changed."""

from comfy.quant_ops import QuantizedTensor

from ...turbo_core.schedule import untrained
from ..host.blocks import has_trained_sla
from ..host.loading import SOURCE, file_name
from ..host.weights import PREFIX, original_weight
from .running import running, warn


def of_sampling(model, low, boundary, sigmas) -> list[str]:
    """On the MODELs of a Turbo Sampler; low: the second expert or None, sigmas [steps + 1]."""
    said, names = [], (file_name(model), "" if low is None else file_name(low))
    if low is not None and names[0] and names[0] == names[1]:
        said.append(
            f"Both experts are the file {names[0]}: the low-noise steps want the other one, with low in its name."
        )
    if low is None and sigmas[0] >= boundary > sigmas[-2]:
        noise = next((n for n in ("high", "low") if n in names[0].lower()), None)
        if noise is not None:
            other, place = ("low", "model_low") if noise == "high" else ("high", "model, and this one to model_low")
            said.append(
                f"{names[0]} is the {noise}-noise expert of two and samples all steps alone, past the boundary "
                f"{boundary:g}: connect the {other}-noise one to {place}."
            )
    plain = [name or "This model" for which, name in zip((model, low), names) if which and not _distilled(which)]
    if plain:
        said.append(
            f"{plain[0]} is not known to be distilled: in {len(sigmas) - 1} steps without guidance it "
            "gives a blurred video. Take a TurboWan file, connect a few-step LoRA before this node, or sample with "
            "KSampler in 20 to 50 steps and CFG 5."
        )
    elif untrained(len(sigmas) - 1):
        said.append(untrained(len(sigmas) - 1))
    return said


def _distilled(model):
    """False where nothing tells that a few steps are enough: neither the file nor a LoRA, which may bring it."""
    source = model.get_attachment(SOURCE)
    text = "" if source is None else f"{source.family} {source.path}".lower()
    known = any(word in text for word in ("turbo", "rcm", "distill", "lightx2v", "lightning", "tinywan", "step"))
    known = known and "teacher" not in file_name(model).lower()  # TinyWan's own lies beside its students
    return has_trained_sla(model.model.diffusion_model) or known or bool(model.patches) or bool(model.injections)


def of_percents(start, end) -> list[str]:
    """On where sparse attention begins and ends."""
    if start < end:
        return []
    return [
        f"start_percent {start:g} is not below end_percent {end:g}: attention is dense in every step. Exchange the "
        "two, or take 0 and 1."
    ]


def of_quantizing(model, layers) -> list[str]:
    """On the layers, by name, that a MODEL is about to have as int8: those that are already."""
    stored = {name: original_weight(model, f"{PREFIX}{name}.weight") for name in layers}
    twice = [name for name, weight in stored.items() if isinstance(weight, QuantizedTensor)]
    if not twice:
        return []
    return [
        f"{len(twice)} of {len(layers)} layers are quantized already, {twice[0]} is one. In the same format they stay "
        "as they are, from another one they are rounded twice: leave this node out, or load the unquantized file."
    ]


def tell_of_scheduler(scheduler, steps, *notes):
    """Say on the KSampler that runs what is not for models that need this scheduler: CFG above 1, another sampler, more
    steps than 4; and notes."""
    now, said = running(), list(notes)
    if now is None:
        warn(*said)
        return
    graph, number = now
    given = graph.get(number, {}).get("inputs", {})
    cfg, sampler = given.get("cfg"), given.get("sampler_name")
    if isinstance(cfg, (int, float)) and cfg > 1:
        said.append(
            f"cfg {cfg:g} with {scheduler}: guidance is distilled into TurboWan models, and above 1 it burns the "
            "colours and takes twice the time. Set cfg to 1."
        )
    if isinstance(sampler, str) and sampler not in ("lcm", "euler"):
        # some ask for a step more and leave one out: other times than the model was trained for
        said.append(f"{sampler} with {scheduler}: few-step models are for lcm (noise drawn anew) or euler. Choose one.")
    elif untrained(steps):
        denoise = given.get("denoise")
        part = f" (KSampler's steps / denoise {denoise:g})" if isinstance(denoise, float) and denoise < 1 else ""
        said.append(f"{scheduler}{part}: {untrained(steps)}")
    warn(*said)
