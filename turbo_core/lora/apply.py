"""LoRAs put on a model that is in memory, and others in their place.

Float parameters take the sum: the original plus strength * alpha / rank * up @ down, in float32, rounded once to their
type. An int8 weight stays as it is, and the low-rank product is added beside it: rounded into int8 again, a small LoRA
would drown in the rounding. So int8 weights need not be read again when LoRAs change, and float parameters only where
one had changed them.
"""

import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from ..wan import Int8Linear
from .kinds import low_rank, whole
from .read import LoraFile, read


def put_on(
    model,
    loras: Iterable[tuple[LoraFile, float]],
    changed: frozenset[str],
    original: Callable[[list[str]], Iterator[tuple[str, torch.Tensor]]],
    all_original: bool = False,
) -> frozenset[str]:
    """Make `model`, whose float parameters `changed` hold earlier LoRAs, the model with these ones: (file, strength).

    original: yields the parameters of these names as the model's file has them. all_original: take all that are to
    change from there, for what is in the model is not to be relied on. Returns the names of the float parameters that
    are changed now. When reading fails, the model is a mixture: drop it.
    """
    model.edition += 1  # what was kept of the text belongs to other weights
    beside, added = {}, {}
    for file, strength in loras:
        opened = file.opened()
        for name, changes in file.changes.items():
            linear = model.get_submodule(name.rpartition(".")[0])
            where = beside if isinstance(linear, Int8Linear) and name.endswith(".weight") else added
            for change in changes:
                where.setdefault(name, []).append((file, functools.partial(read, opened), change, strength))
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            module.beside = _factors(beside.get(f"{name}.weight", []), model.patch_embedding.weight)
    from_file = [name for name in {**dict.fromkeys(added), **dict.fromkeys(changed)} if all_original or name in changed]
    bases = ((name, _parameter(model, name)) for name in added if name not in from_file)
    with torch.no_grad():
        for source in (original(from_file) if from_file else (), bases):
            for name, base in source:
                _replace(model, name, _sum(base, added.get(name, []), _parameter(model, name)))
    return frozenset(added)


def _factors(changes, like) -> tuple:
    """The parts of Int8Linear.beside: low-rank changes of all LoRAs as one, then whole ones."""
    downs, ups, parts = [], [], []
    for file, get, change, strength in changes:
        on_device = functools.partial(get, device=like.device)
        pair = low_rank(change, on_device, file.shapes)
        if pair is None:
            parts.append(((whole(change, on_device) * strength).to(like.dtype), None))
        else:
            downs.append(pair[0])
            ups.append(pair[1] * strength)
    if downs:
        parts.insert(0, (torch.cat(downs).to(like.dtype), torch.cat(ups, 1).to(like.dtype)))
    return tuple(parts)


def _sum(base, changes, like) -> torch.Tensor:
    """base plus its changes, of the type and on the device of `like`."""
    if not changes:
        return base.to(like)
    # first as the model holds it: a file in float32 must give the same sum as what was read of it into bfloat16
    total = base.to(like).to(torch.float32, copy=True)
    rows = total.view(total.shape[0], -1)
    for _, get, change, strength in changes:
        rows.add_(whole(change, functools.partial(get, device=like.device)).view_as(rows), alpha=strength)
    return total.to(like.dtype)


def _parameter(model, name) -> torch.Tensor:
    return getattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])


def _replace(model, name, value):
    """Other numbers for a parameter, in a tensor of its own: the old one may lie in a file that must not change."""
    owner, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner)
    is_parameter = leaf in owner._parameters
    setattr(owner, leaf, nn.Parameter(value, requires_grad=False) if is_parameter else value)
