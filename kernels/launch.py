"""Launch parameters of the int8 products, by card and form: a table that comes with the pack, and one tuned here."""

import contextlib
from typing import NamedTuple

import torch


class Config(NamedTuple):
    """How one launch is cut up."""

    block_m: int
    block_n: int
    group_m: int  # rows of tiles that share weights in the L2 cache
    warps: int
    stages: int


DEFAULT = Config(128, 128, 8, 8, 3)


def config(form, m, device) -> Config:
    return DEFAULT


def run(kernel, grid, arguments, options):
    """Launch on the device of the first argument, which need not be the current one."""
    if grid[0]:
        device = arguments[0].device
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](*arguments, **options)
