"""Lists of transformer blocks as people write them."""

import re

from ..turbo_core.errors import TurboError


def parse_blocks(text: str | None, count: int) -> frozenset[int]:
    """Block numbers in a text such as "0, 1, 38-39" or "first 2, last 1"; empty means none. Raises TurboError else."""
    blocks = set()
    for part in filter(None, (p.strip() for p in (text or "").split(","))):
        first, last = _range(part, count)
        if not 0 <= first <= last < count:
            raise TurboError(
                f"block list: {part!r} is not within 0 to {count - 1}; write it like "
                f'"0, 1, {count - 1}" or "first 2, last 1".'
            )
        blocks.update(range(first, last + 1))
    return frozenset(blocks)


def _range(part, count):
    """First and last block of one part; what cannot be read is an empty range."""
    if match := re.fullmatch(r"(first|last)\s*(\d+)", part.lower()):
        number = int(match[2])
        return (0, number - 1) if match[1] == "first" else (count - number, count - 1)
    match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part)
    return (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
