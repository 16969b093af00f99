"""Libraries that only the standalone pipeline needs."""

from .errors import TurboError


def missing_library(name: str, purpose: str) -> TurboError:
    """The error for an optional library that is not installed, with the cure."""
    return TurboError(
        f"{purpose} needs the Python package {name}, which is not installed. Cure: "
        'pip install "comfyui-turbowan[pipeline]", or from a checkout: pip install -e ".[pipeline]"'
    )
