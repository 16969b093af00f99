"""The one exception that a person can mend, and the commonest of its kind."""


class TurboError(ValueError):
    """Input that a user can correct; the message names what was expected, what came, and the cure."""


def missing_library(name: str, purpose: str) -> TurboError:
    """The error for a library that only the standalone pipeline needs and that is not installed, with the cure."""
    return TurboError(
        f"{purpose} needs the Python package {name}, which is not installed. Cure: "
        'pip install "comfyui-turbowan[pipeline]", or from a checkout: pip install -e ".[pipeline]"'
    )
