"""A LoRA file held to a Wan model: which of its tensors change which parameter.

The low-rank kind of all training tools, and the plain differences (diff, diff_b) that are extracted beside it. What of
a file belongs to no layer of the model is told in the log, a kind that is not computed here is an error: left out, it
would silently be another LoRA.
"""

import logging
import math
from pathlib import Path
from typing import NamedTuple

import torch

from ..checkpoint.formats import check_finite
from ..checkpoint.lora_names import in_comfyui_names, spellings, split_name, why_not
from ..checkpoint.read import open_tensors
from ..errors import TurboError, shown
from ..files import state_of

_PREFIX = "diffusion_model."
_DOWN = {"lora_A.weight", "lora_A", "lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight"}
_UP = {"lora_B.weight", "lora_B", "lora_up.weight", "lora.up.weight", "lora_linear_layer.up.weight"}
_OF_WEIGHT, _OF_BIAS = {"diff", "w_norm"}, {"diff_b", "b_norm"}
_CURE = "Merge it in ComfyUI by Turbo LoRA Report and Turbo Save, and give the file that comes out as the model."


class Change(NamedTuple):
    """Tensors of a file that change one parameter: scale * up @ down, or without down the difference itself."""

    up: str
    down: str | None
    scale: float


class LoraFile:
    """A LoRA file that fits a model: changes {parameter: [Change]}. Nothing of it stays open."""

    def __init__(self, path, shapes: dict[str, tuple[int, ...]], model: str):
        """shapes: of the model's parameters by their official names; model: what errors call it. Reads the header
        alone. Raises TurboError where nothing of the file is for such a model, or something of it is of a kind or
        shape that cannot be added."""
        self.path = Path(path)
        tensors = open_tensors(self.path).tensors
        self.state = state_of(self.path)
        layers = [name.removesuffix(".weight") for name in shapes if not name.endswith(".bias")]
        renamed = in_comfyui_names(tensors, layers)
        if not renamed:
            raise TurboError(self._of_another(tensors, layers, model))
        parts = {}
        for stored, name in renamed.items():
            layer, part = split_name(name.removeprefix(_PREFIX))
            parts.setdefault(layer, {})[part] = stored
        self.changes = {}
        for layer, found in parts.items():
            self._add(layer, found, tensors, shapes, model)
        for name, changes in self.changes.items():
            for change in changes:
                self._check_shape(name, change, tensors, shapes, model)
        self._sizes = {name: tensors[name].numel() for name in self._used(self.changes)}
        self._tell(why_not([name for name in tensors if name not in renamed], layers))

    def opened(self):
        """The file as a TensorFile. Raises TurboError where it has changed since it was held to the model."""
        file = open_tensors(self.path)
        if state_of(self.path) != self.state:
            raise TurboError(f"{self.path} has changed since this run began. Start it again.")
        return file

    def check_values(self) -> None:
        """Raise TurboError for NaN or infinity in what is used of the file. Reads all of it."""
        file = self.opened()
        for name in self._sizes:
            check_finite(name, file.disk.read(file.tensors[name]), self.path)

    def size_of(self, parameters) -> int:
        """How many numbers the changes of these parameters are."""
        return sum(self._sizes[name] for name in self._used(parameters & self.changes.keys()))

    def _used(self, parameters):
        return [part for name in parameters for change in self.changes[name] for part in change[:2] if part]

    def _add(self, layer, found, tensors, shapes, model):
        weight = f"{layer}.weight" if f"{layer}.weight" in shapes else layer
        down, up = ([found[part] for part in found if part in names] for names in (_DOWN, _UP))
        strange = found.keys() - _DOWN - _UP - _OF_WEIGHT - _OF_BIAS - {"alpha"}
        if strange:
            raise TurboError(f"{self.path}: {shown(found[min(strange)])} is of a kind that is not added here. {_CURE}")
        if len(down) != len(up) or len(down) > 1:
            half = (down + up)[0]
            raise TurboError(
                f"{self.path}: {shown(half)} is one half of a pair without the other. The file is damaged: download "
                "or save it again."
            )
        for down_name, up_name in zip(down, up):
            rank = tensors[down_name].shape[0] if tensors[down_name].ndim else 0
            alpha = self._alpha(found["alpha"], tensors) if "alpha" in found else rank
            self.changes.setdefault(weight, []).append(Change(up_name, down_name, alpha / max(1, rank)))
        for part, stored in found.items():
            if part in _OF_WEIGHT | _OF_BIAS:
                name = weight if part in _OF_WEIGHT else f"{layer}.bias"
                if name not in shapes:
                    raise TurboError(f"{self.path}: {shown(stored)} changes {name}, which {model} does not have.")
                self.changes.setdefault(name, []).append(Change(stored, None, 1.0))

    def _alpha(self, name, tensors) -> float:
        value = tensors[name]
        alpha = value.item() if value.numel() == 1 else math.nan
        if not math.isfinite(alpha):
            raise TurboError(f"{self.path}: {shown(name)} is no finite number. The file is damaged: use another one.")
        return alpha

    def _check_shape(self, name, change, tensors, shapes, model):
        for part in filter(None, change[:2]):
            if not tensors[part].is_floating_point():
                raise TurboError(f"{self.path}: {shown(part)} is {tensors[part].dtype}. Expected floats.")
        up = tensors[change.up]
        expected, got = (shapes[name][0], math.prod(shapes[name][1:])), None
        if change.down is None:
            got = (up.shape[0], math.prod(up.shape[1:])) if up.ndim else None
        else:
            down = tensors[change.down]
            if up.ndim > 1 and down.ndim > 1 and math.prod(up.shape[1:]) == down.shape[0] > 0:
                got = up.shape[0], math.prod(down.shape[1:])
        if got != expected:
            halves = " and ".join(str(list(tensors[part].shape)) for part in filter(None, change[:2]))
            raise TurboError(
                f"{self.path}: {shown(change.up)} changes {name} by {halves}. Expected {list(expected)} in {model}: "
                "use a LoRA for this size of Wan."
            )

    def _of_another(self, tensors, layers, model) -> str:
        known = {spelling for layer in layers for spelling in spellings(layer)}
        if any(split_name(name)[0].removesuffix(".weight") in known for name in tensors):
            return f"{self.path} holds whole weights: a model, no LoRA. Expected a LoRA: give models as --dit."
        reasons = why_not(tensors, layers)
        why = max(reasons, key=lambda why: len(reasons[why])) if reasons else "it is empty"
        return (
            f"{self.path} changes nothing of {model}: {len(tensors)} tensors, the first {shown(next(iter(tensors)))}, "
            f"most of them {why}. Use a LoRA for Wan."
        )

    def _tell(self, reasons):
        for why, names in reasons.items():
            logging.warning(
                "TurboWan: %s: %d tensors are left out, %s: %s", self.path, len(names), why,
                ", ".join(map(shown, names[:3])),
            )  # fmt: skip


def read(file, name: str, device) -> torch.Tensor:
    """A tensor of an opened file as float32 [rows, columns] on a device, vectors as one column."""
    tensor = file.disk.read(file.tensors[name])
    return tensor.to(device).float().reshape(tensor.shape[0], -1)
