"""A LoRA file held to a Wan model: which of its tensors change which parameter.

The low-rank kind of all training tools, LoHa and LoKr, and the plain differences (diff, diff_b) that are extracted
beside them. What of a file belongs to no layer of the model is told in the log, a kind that is not computed here is an
error: left out, it would silently be another LoRA.
"""

import logging
import math
from pathlib import Path

import torch

from ..checkpoint.formats import check_finite
from ..checkpoint.lora_names import in_comfyui_names, spellings, split_name, stated_alphas, why_not
from ..checkpoint.read import open_tensors
from ..errors import TurboError, shown
from ..files import state_of
from .kinds import LOHA, LOKR, LORA, WHOLE, Change, beside, size

_PREFIX = "diffusion_model."
_DOWN = {"lora_A.weight", "lora_A", "lora_down.weight", "lora.down.weight", "lora_linear_layer.down.weight"}
_UP = {"lora_B.weight", "lora_B", "lora_up.weight", "lora.up.weight", "lora_linear_layer.up.weight"}
_OF_WEIGHT, _OF_BIAS = {"diff", "w_norm"}, {"diff_b", "b_norm"}
_HADA = "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"
_CURE = "Merge it in ComfyUI by Turbo LoRA Report and Turbo Save, and give the file that comes out as the model."


class LoraFile:
    """A LoRA file that fits a model: changes {parameter: [Change]}. Nothing of it stays open."""

    def __init__(self, path, shapes: dict[str, tuple[int, ...]], model: str):
        """shapes: of the model's parameters by their official names; model: what errors call it. Reads the header
        alone. Raises TurboError where nothing of the file is for such a model, or something of it is of a kind or
        shape that cannot be added."""
        self.path = Path(path)
        file = open_tensors(self.path)
        tensors = file.tensors
        self.state = state_of(self.path)
        layers = [name.removesuffix(".weight") for name in shapes if not name.endswith(".bias")]
        renamed = in_comfyui_names(tensors, layers)
        if not renamed:
            raise TurboError(self._of_another(tensors, layers, model))
        parts = {}
        for stored, name in renamed.items():
            layer, part = split_name(name.removeprefix(_PREFIX))
            first = parts.setdefault(layer, {}).setdefault(part, stored)
            if first != stored:  # of two experts, or two adapters: which is meant nothing says
                raise TurboError(
                    f"{self.path} holds {shown(first)} and {shown(stored)}, both for {layer}: two LoRAs in one file. "
                    "Save each in a file of its own."
                )
        self.changes, self.shapes = {}, {name: tuple(tensors[name].shape) for name in renamed}
        for layer, found in parts.items():
            self._add(layer, found, tensors, shapes, model)
        for name, changes in self.changes.items():
            for change in changes:
                self._check_shape(name, change, tensors, shapes, model)
        self._tell(why_not([name for name in tensors if name not in renamed], layers), stated_alphas(file.metadata))

    def opened(self):
        """The file as a TensorFile. Raises TurboError where it has changed since it was held to the model."""
        file = open_tensors(self.path)
        if state_of(self.path) != self.state:
            raise TurboError(f"{self.path} has changed since this run began. Start it again.")
        return file

    def check_values(self) -> None:
        """Raise TurboError for NaN or infinity in what is used of the file. Reads all of it."""
        file = self.opened()
        for changes in self.changes.values():
            for name in (name for change in changes for name in change.parts):
                check_finite(name, file.disk.read(file.tensors[name]), self.path)

    def size_of(self, parameters) -> int:
        """How many numbers lie beside these, int8 parameters."""
        changes = [change for name in parameters & self.changes.keys() for change in self.changes[name]]
        return sum(beside(change, self.shapes) for change in changes)

    def _add(self, layer, found, tensors, shapes, model):
        weight = f"{layer}.weight" if f"{layer}.weight" in shapes else layer
        alpha = self._alpha(found["alpha"], tensors) if "alpha" in found else None

        def scale(inner):
            return 1.0 if alpha is None or inner is None else alpha / max(1, *tensors[inner].shape[:1])

        down, up = ([found[part] for part in found if part in names] for names in (_DOWN, _UP))
        used = {"alpha"} | _DOWN | _UP | _OF_WEIGHT | _OF_BIAS
        changes, wanted = [Change(LORA, (up, down), scale(down)) for up, down in zip(up[:1], down[:1])], []
        if found.keys() & set(_HADA):
            used |= set(_HADA)
            wanted += _HADA
            changes.append(Change(LOHA, tuple(map(found.get, _HADA)), scale(found.get(_HADA[1]))))
        if any(part.startswith("lokr_w") for part in found):
            matrices = [part for n in "12" for part in _kron(n, found)]
            used |= {f"lokr_w{n}{half}" for n in "12" for half in ("", "_a", "_b")}
            wanted += filter(None, matrices)
            names = tuple(map(found.get, matrices))
            changes.append(Change(LOKR, names, scale(names[3] or names[1])))
        strange = found.keys() - used
        if strange:
            raise TurboError(f"{self.path}: {shown(found[min(strange)])} is of a kind that is not added here. {_CURE}")
        if len(down) != len(up) or len(down) > 1 or not found.keys() >= set(wanted):
            half = next(iter((*down, *up, *found.values())))
            raise TurboError(
                f"{self.path}: {shown(half)} is one half of a pair without the other. The file is damaged: download "
                "or save it again."
            )
        if changes:
            self.changes.setdefault(weight, []).extend(changes)
        for part, stored in found.items():
            if part in _OF_WEIGHT | _OF_BIAS:
                name = weight if part in _OF_WEIGHT else f"{layer}.bias"
                if name not in shapes:
                    raise TurboError(f"{self.path}: {shown(stored)} changes {name}, which {model} does not have.")
                self.changes.setdefault(name, []).append(Change(WHOLE, (stored,)))

    def _alpha(self, name, tensors) -> float:
        value = tensors[name]
        alpha = value.item() if value.numel() == 1 else math.nan
        if not math.isfinite(alpha):
            raise TurboError(f"{self.path}: {shown(name)} is no finite number. The file is damaged: use another one.")
        return alpha

    def _check_shape(self, name, change, tensors, shapes, model):
        for part in change.parts:
            if not tensors[part].is_floating_point():
                raise TurboError(f"{self.path}: {shown(part)} is {tensors[part].dtype}. Expected floats.")
        expected = shapes[name][0], math.prod(shapes[name][1:])
        if size(change, self.shapes) != expected:
            halves = " and ".join(str(list(tensors[part].shape)) for part in change.parts)
            raise TurboError(
                f"{self.path}: {shown(change.parts[0])} changes {name} by {halves}. Expected {list(expected)} in "
                f"{model}: use a LoRA for this size of Wan."
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

    def _tell(self, reasons, alphas):
        for alpha, rank in alphas:
            logging.warning(
                "TurboWan: %s states alpha %g at rank %g in its metadata, which is not applied, as in ComfyUI: "
                "strength %g is its full strength.", self.path, alpha, rank, alpha / rank,
            )  # fmt: skip
        for why, names in reasons.items():
            logging.warning(
                "TurboWan: %s: %d tensors are left out, %s: %s", self.path, len(names), why,
                ", ".join(map(shown, names[:3])),
            )  # fmt: skip


def read(file, name: str, device) -> torch.Tensor:
    """A tensor of an opened file as float32 [rows, columns] on a device, vectors as one column."""
    tensor = file.disk.read(file.tensors[name])
    return tensor.to(device).float().reshape(tensor.shape[0], -1)


def _kron(n, found) -> tuple[str, str | None]:
    """Parts of one of LoKr's matrices: itself and nothing, or its two factors."""
    full = f"lokr_w{n}"
    return (full, None) if full in found else (f"{full}_a", f"{full}_b")
