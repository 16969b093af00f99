"""What may stay in memory from one video to the next, by the planner's count of what a video takes."""

from typing import NamedTuple

import torch

from ..checkpoint import Description
from ..checkpoint.formats import INTEGERS
from ..devices import available_memory
from ..errors import TurboError
from ..files import human_bytes
from . import plan
from .clip import Ready

GROUP = 8  # clips that pass one expert, or the DiT, before the next network is read
_SHARE = 0.8  # of main memory that is free
_LOCKED = 0.5  # of the same: what is locked nobody else gets, pages of files neither


class Stay(NamedTuple):
    """What may be in memory together, from all to nothing."""

    experts: bool = False  # all diffusion models and the VAE, in turn with sampling and decoding
    dit: bool = False  # one of them and the VAE
    overlap: bool = False  # sampling and decoding at the same time

    def words(self, waits: bool = False) -> str:
        """The same for a person. waits: what does not stay on the device waits in page-locked memory, not on disk."""
        place = ", which wait in page-locked memory" if waits else ""
        if not self.dit:
            return f"networks take turns{place}, {GROUP} videos at a time"
        stays = "all diffusion models stay" if self.experts else f"one diffusion model stays{place}"
        return f"{stays}, {'sampling beside decoding' if self.overlap else 'sampling and decoding in turn'}"

    def together(self, has_low: bool) -> int:
        """How many clips are sampled before the next network is read in the place of this one."""
        return 1 if self.dit and (self.experts or not has_low) else GROUP


def what_stays(model: Description, ready: Ready, expert_bytes: list[int], memory: int, dtype) -> Stay:
    """memory: bytes beside the VAE's weights."""
    step = _step_bytes(model, ready, dtype)
    decode = plan.vae_peak(*ready.size, "decode", ready.clip.tiled) * dtype.itemsize / 2
    dit = max(expert_bytes) + max(step, decode) <= memory
    experts = sum(expert_bytes) + max(step, decode) <= memory
    held = sum(expert_bytes) if experts else max(expert_bytes)
    return Stay(experts, dit, dit and held + step + decode <= memory)


def check_room(model: Description, ready: Ready, dtype, device: torch.device, processes: int = 1) -> None:
    """Raise TurboError where a step on a CPU, or this one of several processes' part of it, takes more than the machine
    has: no error of torch would say so, the system would end this process, or another one."""
    known = available_memory() if device.type == "cpu" else None
    step = _step_bytes(model, ready, dtype) / processes
    if known is not None and step > known[1]:
        raise TurboError(
            "{}x{}".format(*ready.size) + f" with {ready.clip.frames} frames: a step takes {human_bytes(step)} of "
            f"memory, and there are {human_bytes(known[1])}. Use a smaller --size or fewer --frames."
        )


def _step_bytes(model, ready, dtype) -> float:
    """What sampling takes beside the weights."""
    linears = model.format if model.format in INTEGERS else "float"
    planned = plan.model_of(model)
    step = plan.step_peak(planned, ready.tokens, linears, ready.topk, ready.clip.precision)[0]
    # the planner counts in types of two bytes
    return (step + plan.kept_text_bytes(planned)) * dtype.itemsize / 2


def free_memory(device: torch.device) -> int:
    """Bytes that models may fill: what is free now, less an allowance."""
    if device.type == "cuda":
        return max(0, torch.cuda.mem_get_info(device)[0] - plan.RESERVED)
    known = available_memory()
    return 0 if known is None else int(_SHARE * known[0])


def waiting_memory(device: torch.device) -> int:
    """Bytes of page-locked memory that models may wait in for a card; on others there is none."""
    known = available_memory() if device.type == "cuda" else None
    return 0 if known is None else int(_LOCKED * known[0])
