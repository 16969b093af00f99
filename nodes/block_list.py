"""Lists of transformer blocks as people write them."""

import re

from ..turbo_core.errors import TurboError


def parse_blocks(text: str | None, count: int) -> frozenset[int]:
    """Block numbers in a text such as "0, 1, 38-39"; empty means none. Raises TurboError for anything else."""
    blocks = set()
    for part in filter(None, (p.strip() for p in (text or "").split(","))):
        match = re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or last >= count:
            raise TurboError(f'block list: {part!r} is not within 0 to {count - 1}; write it like "0, 1, {count - 1}".')
        blocks.update(range(first, last + 1))
    return frozenset(blocks)
