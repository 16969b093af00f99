"""Time of each step and peak memory of one run, in one line."""

import time

import comfy.model_management

from ..turbo_core.console import human_bytes
from ..turbo_core.memory import peak_memory, reset_peak_memory


class Stages:
    """A stopwatch for one run on one device: start at each expert's first step, mark after every step.

    What lies before a start (loading weights, encoding) counts as the rest of the whole time, not as a step.
    """

    def __init__(self, device):
        self.device, self.steps = device, []
        reset_peak_memory(device)
        self.begun = self.last = time.perf_counter()

    def _now(self):
        comfy.model_management.synchronize()  # a card works behind the program's back
        return time.perf_counter()

    def start(self):
        self.last = self._now()

    def mark(self):
        now = self._now()
        self.steps.append(now - self.last)
        self.last = now

    def line(self) -> str:
        """As in "4 steps in 12.3 s (3.1, 3.0, 3.1, 3.1), loading and the rest 2.4 s, peak 10.2 GB on the card"."""
        rest = self._now() - self.begun - sum(self.steps)
        steps = ", ".join(f"{seconds:.2f}" if seconds < 1 else f"{seconds:.1f}" for seconds in self.steps)
        peak = peak_memory(self.device)
        where = [f"peak {human_bytes(peak['device'])} on the card"] if "device" in peak else []
        where += [f"process at most {human_bytes(peak['process'])}"] if not where and "process" in peak else []
        count = f"{len(self.steps)} step{'s' * (len(self.steps) != 1)}"
        return ", ".join(
            [f"{count} in {sum(self.steps):.1f} s ({steps})", f"loading and the rest {rest:.1f} s", *where]
        )
