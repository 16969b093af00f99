"""What processes that make one clip must have in common: program, cards, files, kernels."""

import torch

from .. import __version__
from ..dispatch import FAMILIES, why_not
from ..files import sample


def program_facts(device, files) -> dict:
    """{name: value} of this process: the program, the kind of card, the files."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    program = {"version of turbo_core": __version__, "version of torch": torch.__version__}
    # a card of another kind would draw other noise, and round otherwise
    return program | {"device": card} | {f"the file {path}": sample(path) for path in files}


def kernel_facts(device) -> dict:
    """Which kernels compute, once they were proved: torch rounds otherwise."""
    return {f"the kernels of {family}": "proved" if why_not(device, family) is None else "off" for family in FAMILIES}
