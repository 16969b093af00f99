"""State dicts of Wan models: two of them compared, saved as a file, under official names, without proj_l."""

import torch
from safetensors.torch import save_file

from turbo_core.checkpoint.names import PROJ_L


def same(a: dict, b: dict) -> bool:
    """True where names, types and every bit agree."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def saved(state: dict, path):
    """The path, after writing the state to it as .pth or .safetensors."""
    torch.save(state, path) if path.suffix == ".pth" else save_file(state, path)
    return path


def official(state: dict) -> dict:
    """A published state with the patch embedding as the official network has it."""
    weight = state["patch_embedding.weight"]
    return state | {"patch_embedding.weight": weight.reshape(weight.shape[0], -1, 1, 2, 2)}


def plain(state: dict) -> dict:
    """The state of a stock model: without proj_l."""
    return {name: tensor for name, tensor in state.items() if PROJ_L not in name}
