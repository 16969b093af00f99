"""What one change of a LoRA file is to its parameter: a low-rank product, LyCORIS' two forms of more, or a difference.

LoHa multiplies two low-rank products number by number, LoKr takes the Kronecker product of two matrices. Source:
LyCORIS, arXiv 2309.14859; scales as ComfyUI applies them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

LORA, LOHA, LOKR, WHOLE = "LoRA", "LoHa", "LoKr", "difference"


class Change(NamedTuple):
    """names: of tensors in the file; LoRA: up, down; LoHa: up, down, up, down; LoKr: the first matrix or its two
    factors, then the second (None where there is no second factor); difference: itself."""

    kind: str
    names: tuple[str | None, ...]
    scale: float = 1.0

    @property
    def parts(self) -> list[str]:
        return [name for name in self.names if name is not None]


def size(change: Change, shapes: dict) -> tuple[int, int] | None:
    """(rows, columns) of a change by the shapes of its tensors, None where they do not fit together."""
    found = [None if name is None else tuple(shapes[name]) for name in change.names]
    if change.kind == WHOLE:
        return _flat(found[0])
    pairs = [_product(*found[at : at + 2]) for at in range(0, len(found), 2)]
    if None in pairs:
        return None
    if change.kind == LOKR:
        (a, b), (c, d) = pairs
        return a * c, b * d
    return pairs[0] if len(set(pairs)) == 1 else None


def beside(change: Change, shapes: dict) -> int:
    """How many numbers lie beside an int8 weight for it."""
    rows, columns = size(change, shapes)
    rank = _rank(change, shapes)
    return rows * columns if rank is None else rank * (rows + columns)


def low_rank(change: Change, read: Callable, shapes: dict) -> tuple | None:
    """(down [R, K], up [N, R]) whose product is the change, float32; None where that is not less than the change.

    read: of a name, float32 [rows, columns]."""
    if _rank(change, shapes) is None:
        return None
    up, down, *more = map(read, change.names)
    if more:  # a product of sums is a sum of products
        up = (up[:, :, None] * more[0][:, None, :]).flatten(1)
        down = (down[:, None, :] * more[1][None]).flatten(0, 1)
    return down, up * change.scale


def whole(change: Change, read: Callable) -> torch.Tensor:
    """The change, float32 [N, K]."""
    if change.kind == WHOLE:
        return read(change.names[0])
    found = [None if name is None else read(name) for name in change.names]
    pairs = [one if two is None else one @ two for one, two in zip(found[::2], found[1::2])]
    made = pairs[0]
    if len(pairs) > 1:
        made = torch.kron(*pairs) if change.kind == LOKR else pairs[0] * pairs[1]
    return made * change.scale


def _rank(change, shapes):
    """Of the low-rank form of a change, None where that is not smaller."""
    if change.kind not in (LORA, LOHA):
        return None
    rank = math.prod(shapes[name][0] for name in change.names[1::2])
    rows, columns = size(change, shapes)
    return rank if change.kind == LORA or rank * (rows + columns) < rows * columns else None


def _flat(shape):
    return (shape[0], math.prod(shape[1:])) if shape else None


def _product(up, down):
    """Size of up @ down, or of up alone."""
    if down is None:
        return up if len(up) == 2 else None
    if len(up) < 2 or len(down) < 2 or not math.prod(up[1:]) == down[0] > 0:
        return None
    return up[0], math.prod(down[1:])
