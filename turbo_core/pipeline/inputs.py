"""Do the inputs of a video fit together: models, experts and settings, before anything computes."""

from pathlib import Path

from .. import checkpoint
from ..errors import TurboError, quoted
from ..sla import PRECISIONS

DEFAULT_TOPK = 0.1  # what the published models were trained with; 0.15 is a little better and slower


def open_models(dit, dit_low=None) -> list[checkpoint.Opened]:
    """dit, and dit_low where there is one, after checking that they can be run and belong together."""
    files = [checkpoint.opened(dit)]
    check_model(files[0].description)
    if dit_low is not None:
        files.append(checkpoint.opened(dit_low))
        check_experts(files[0].description, files[1].description)
    return files


def check_task(model: checkpoint.Description, image) -> None:
    """Raise TurboError unless an image is there where the model needs one, and not where it takes none."""
    if model.task == "i2v" and image is None:
        raise TurboError(f"{model.path} is an image-to-video model ({model.family}): pass --image, or use a T2V model.")
    if model.task == "t2v" and image is not None:
        raise TurboError(
            f"{model.path} is a text-to-video model ({model.family}): leave --image out, or use the I2V models."
        )


def check_model(model: checkpoint.Description) -> None:
    """Raise TurboError unless wan.WanModel is the network for a checkpoint."""
    if model.in_dim not in (16, 36) or model.out_dim != 16 or model.variant is not None:
        more = "" if model.variant is None or str(model.variant) in model.family else f" ({model.variant})"
        raise TurboError(
            f"{model.path} is {model.family}{more}, which turbo_core does not run by itself. It runs TurboWan2.1-T2V, "
            "TurboWan2.2-I2V-A14B (two files) and plain Wan 2.1 T2V; load others in ComfyUI."
        )


def check_experts(high: checkpoint.Description, low: checkpoint.Description) -> None:
    """Raise TurboError unless two files are a high- and a low-noise expert of one release."""
    if Path(high.path).resolve() == Path(low.path).resolve():
        raise TurboError(f"Both experts are the same file {high.path}: give the high- and the low-noise expert.")
    fields = "task", "dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "text_dim", "has_sla"
    if any(getattr(high, name) != getattr(low, name) for name in fields):
        raise TurboError(
            f"The two experts differ: {high.path} is {high.family}, {low.path} is {low.family}. Use the high- and "
            "low-noise file of one release."
        )
    if "low" in Path(high.path).name.lower() and "high" in Path(low.path).name.lower():
        raise TurboError(f"The experts look swapped: {Path(high.path).name} is given as the high-noise file.")


def check_sampling(
    model: checkpoint.Description, has_low: bool, sigmas, boundary: float, topk, precision: str
) -> float | None:
    """The top-k to use (None is dense), after checking the settings against the model. has_low: its low-noise expert is
    there."""
    if not 0.0 < boundary < 1.0:
        raise TurboError(f"boundary is a sigma between 0 and 1, got {boundary}: use 0.9, as the reference does.")
    if model.in_dim == 36 and not has_low and any(0 < sigma < boundary for sigma in sigmas.tolist()):
        raise TurboError(
            f"{model.path} is one of two experts ({model.family}) and {len(sigmas) - 1} steps pass the boundary "
            f"{boundary}: give the high-noise file as --dit and the low-noise file as --dit-low."
        )
    if precision not in PRECISIONS:
        raise TurboError(f"precision must be one of {', '.join(PRECISIONS)}, got {quoted(precision)}.")
    if topk == "auto":
        return DEFAULT_TOPK if model.has_sla else None
    if topk is not None and not 0.0 < topk <= 1.0:
        cure = f"for {topk:g} % give {topk / 100:g}" if 1 < topk <= 100 else f"use {DEFAULT_TOPK:g}"
        raise TurboError(f"topk is the fraction of key blocks to keep, above 0 and up to 1, got {topk}: {cure}.")
    return topk
