"""The one exception that a person can mend, and the commonest of its kind."""


class TurboError(ValueError):
    """Input that a user can correct; the message names what was expected, what came, and the cure, in one line."""

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Text that may come from a file, without what a terminal obeys."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(text, most: int = 80) -> str:
    """A name or value from a file, as an error may show it: printable, and not longer than a line."""
    text = printable(str(text)[: 4 * most])
    return text if len(text) <= most else f"{text[: most - 3]}..."


def quoted(value) -> str:
    """What a person or a file gave, as Python writes it, no longer than a line."""
    return shown(repr(value))


def missing_library(name: str, purpose: str) -> TurboError:
    """The error for a library that only the standalone pipeline needs and that is not installed, with the cure."""
    return TurboError(
        f"{purpose} needs the Python package {name}, which is not installed. Cure: "
        'pip install "comfyui-turbowan[pipeline]", or from a checkout: pip install -e ".[pipeline]"'
    )


def refuse(name, what, expected, got):
    raise TurboError(f"{name}: {what} must be {expected}, got {got}")


def check_device(name, what, t, device):
    """Raise TurboError unless t lies on x's device."""
    if t.device != device:
        refuse(name, what, f"on {device} as x is", f"on {t.device}")


def check_float(name, what, t, shape, device, dtype=None):
    """Raise TurboError unless t is a float tensor, or one of dtype, of this shape on x's device."""
    if not t.is_floating_point() or (dtype and t.dtype != dtype) or tuple(t.shape) != tuple(shape):
        refuse(name, what, f"{dtype or 'float'} {list(shape)}", f"{t.dtype} {list(t.shape)}")
    check_device(name, what, t, device)
