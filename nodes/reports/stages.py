"""Time of each step and peak memory of one run, in one line."""

import time

import comfy.model_management

from ...turbo_core.devices import peak_memory, reset_peak_memory
from ...turbo_core.files import human_bytes
from ..host.ops import part_of_host


class Stages:
    """A stopwatch for one run on one device. What is not a step (loading, previews) counts as the rest."""

    def __init__(self, device):
        self.device, self.steps = device, []
        reset_peak_memory(device)
        self.begun = time.perf_counter()

    def _now(self):
        comfy.model_management.synchronize()  # a card works behind the program's back
        return time.perf_counter()

    def timed(self, model):
        """The model, each evaluation of which counts as one step."""

        def step(*args, **kwargs):
            begun = self._now()
            denoised = model(*args, **kwargs)
            self.steps.append(self._now() - begun)
            return denoised

        return step

    def line(self) -> str:
        """As in "4 steps in 12.3 s (3.1, 3.0, 3.1, 3.1), loading and the rest 2.4 s, peak 10.2 GB on the card"."""
        total, rest = sum(self.steps), self._now() - self.begun - sum(self.steps)
        each = ", ".join(f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.2f}" for seconds in self.steps)
        plural = "s" * (len(self.steps) != 1)
        parts = [f"{len(self.steps)} step{plural} in {total:.1f} s ({each})", f"loading and the rest {rest:.1f} s"]
        peak = peak_memory(self.device)
        if "device" in peak:
            # dynamic VRAM keeps weights where torch does not count them
            beside = ", dynamic weights not counted" if part_of_host("memory_management", "aimdo_enabled") else ""
            parts.append(f"peak {human_bytes(peak['device'])} on the card{beside}")
        elif "process" in peak:
            parts.append(f"peak {human_bytes(peak['process'])} since ComfyUI started")
        return ", ".join(parts)
