"""Do the inputs of a video fit together: models, experts and settings, before anything computes."""

from pathlib import Path

from .. import checkpoint
from ..errors import TurboError
from ..sla import PRECISIONS

DEFAULT_TOPK = 0.1  # what the published models were trained with; 0.15 is a little better and slower


def check_models(dit, dit_low=None, image=None) -> checkpoint.Description:
    """The description of dit, after checking that the experts belong together and an image is there when needed."""
    model = check_model(dit)
    if model.task == "i2v" and image is None:
        raise TurboError(f"{dit} is an image-to-video model ({model.family}): pass --image, or use a T2V model.")
    if model.task == "t2v" and image is not None:
        raise TurboError(f"{dit} is a text-to-video model ({model.family}): leave --image out, or use the I2V models.")
    if dit_low is not None:
        check_experts(dit, dit_low)
    return model


def check_model(path) -> checkpoint.Description:
    """The description of a checkpoint, after checking that wan.WanModel is the network for it."""
    model = checkpoint.inspect(path)
    if model.in_dim not in (16, 36) or model.out_dim != 16 or model.family.startswith("Wan2.1-I2V"):
        raise TurboError(
            f"{path} is {model.family}, which turbo_core does not run by itself. It runs TurboWan2.1-T2V, "
            "TurboWan2.2-I2V-A14B (two files) and plain Wan 2.1 T2V; load others in ComfyUI."
        )
    return model


def check_experts(high, low) -> None:
    """Raise TurboError unless two files are a high- and a low-noise expert of one release."""
    if Path(high).resolve() == Path(low).resolve():
        raise TurboError(f"Both experts are the same file {high}: give the high- and the low-noise expert.")
    first, second = checkpoint.inspect(high), checkpoint.inspect(low)
    fields = "task", "dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "text_dim", "has_sla"
    if any(getattr(first, name) != getattr(second, name) for name in fields):
        raise TurboError(
            f"The two experts differ: {high} is {first.family}, {low} is {second.family}. Use the high- and "
            "low-noise file of one release."
        )
    if "low" in Path(high).name.lower() and "high" in Path(low).name.lower():
        raise TurboError(f"The experts look swapped: {Path(high).name} is given as the high-noise file.")


def check_sampling(model, dit_low, sigmas, boundary: float, topk, precision: str) -> float | None:
    """The top-k to use (None is dense), after checking the settings against the model."""
    if not 0.0 < boundary < 1.0:
        raise TurboError(f"boundary is a sigma between 0 and 1, got {boundary}: use 0.9, as the reference does.")
    if model.in_dim == 36 and dit_low is None and any(0 < sigma < boundary for sigma in sigmas.tolist()):
        raise TurboError(
            f"{model.path} is one of two experts ({model.family}) and {len(sigmas) - 1} steps pass the boundary "
            f"{boundary}: give the high-noise file as --dit and the low-noise file as --dit-low."
        )
    if precision not in PRECISIONS:
        raise TurboError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    if topk == "auto":
        return DEFAULT_TOPK if model.has_sla else None
    if topk is not None and not 0.0 < topk <= 1.0:
        raise TurboError(f"topk is the fraction of key blocks to keep, above 0 and up to 1, got {topk}: use 0.1.")
    return topk
