"""A LoRA as a person writes it: a file and a strength."""

import math
import os
from pathlib import Path
from typing import NamedTuple

from ..errors import TurboError, shown

MOST_STRENGTH = 100.0


class Lora(NamedTuple):
    """A LoRA that is wanted. strength: 0 leaves it off, below 0 takes away what it learned."""

    file: Path
    strength: float = 1.0


def as_loras(wanted) -> tuple[Lora, ...]:
    """LoRAs from a list of "FILE", "FILE:STRENGTH", (file, strength) or Lora. Raises TurboError for a strength that is
    no number from -100 to 100."""
    return tuple(_as_lora(one) for one in wanted)


def _as_lora(wanted) -> Lora:
    if isinstance(wanted, (str, Path)):
        return _parsed(str(wanted))
    file, strength = wanted
    return Lora(Path(file), _strength(strength, file))


def _parsed(text: str) -> Lora:
    """A file's name may hold a colon, and begins with one after its drive in Windows."""
    file, colon, strength = text.rpartition(":")
    is_path = not colon or os.path.isfile(text) or "/" in strength or "\\" in strength
    if is_path or (os.name == "nt" and len(file) == 1):
        file, strength = text, 1.0
    if not file.strip():
        raise TurboError(f"LoRA {shown(text)!r} names no file. Expected FILE or FILE:STRENGTH.")
    return Lora(Path(file), _strength(strength, file))


def _strength(value, file) -> float:
    try:
        strength = float(value)
    except (TypeError, ValueError):
        strength = math.nan
    if isinstance(value, bool) or not abs(strength) <= MOST_STRENGTH:  # NaN is not either
        raise TurboError(
            f"LoRA {shown(file)}: the strength is {shown(value)}. Expected a number from {-MOST_STRENGTH:g} to "
            f"{MOST_STRENGTH:g}, as in FILE:0.8."
        )
    return strength
