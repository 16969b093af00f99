"""What of a LoRA acts on a MODEL, what does not and why, and what int8 weights do to it."""

import collections
import math
import re

import comfy.lora
import comfy.lora_convert
import torch
from comfy.ldm.wan.model import WanModel
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter import WeightAdapterBase

from ...turbo_core.checkpoint import lora_names
from ..host.fused import FeedForward
from ..host.ops import takes_activation
from ..host.weights import PREFIX, original_weight
from .facts import weight_format

_HALVES = (("lora_up.", "lora_down."), ("lora_B", "lora_A"), ("lora.up.", "lora.down."), ("hada_w1_a", "hada_w1_b"))
_KINDS = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT", "boft": "BOFT", "glora": "GLoRA"}
_ROWS = 128  # of a layer that the size of a change is taken from
_ROUNDING = 6**-0.5  # the host rounds a merged sum stochastically: this many steps, root mean square


class _Noting(dict):
    """A LoRA's tensors that remember which of them were taken; the host keeps that to itself."""

    taken = frozenset()

    def __getitem__(self, name):
        self.taken |= {name}
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.taken |= {name} & self.keys()
        return super().get(name, default)


def _without_halves(tensors):
    """(tensors, names of those whose other half is missing, on which the host would fail)."""
    pairs = [pair for one, other in _HALVES for pair in ((one, other), (other, one))]
    alone = {n for n in tensors for one, other in pairs if one in n and n.replace(one, other) not in tensors}
    return {name: tensor for name, tensor in tensors.items() if name not in alone}, sorted(alone)


def _rank_and_size(patch):
    """(kind, rank, (rows, columns) of the change); rank and size are None where the kind does not tell them."""
    if not isinstance(patch, WeightAdapterBase):
        values = patch[1][0]
        return "set value" if patch[0] == "set" else "difference", None, (values.shape[0], values[0].numel())
    w, kind = patch.weights, _KINDS.get(patch.name, patch.name)
    if patch.name == "lora" and w[3] is None and w[5] is None:
        return ("DoRA" if w[4] is not None else kind), w[1].shape[0], (w[0].shape[0], w[1][0].numel())
    if patch.name == "loha" and w[5] is None:
        return kind, w[1].shape[0], (w[0].shape[0], w[1].shape[1])
    if patch.name == "lokr" and w[7] is None:
        first, second = (
            full.shape if full is not None else (a.shape[0], b.shape[1])
            for full, a, b in ((w[0], w[3], w[4]), (w[1], w[5], w[6]))
        )
        low = next((b for b in (w[4], w[6]) if b is not None), None)
        size = first[0] * second[0], math.prod(first[1:]) * math.prod(second[1:])
        return kind, None if low is None else low.shape[0], size
    return kind, None, None


def _above_rounding(patch, weight):
    """How many times larger than the rounding of its int8 weight a LoRA's change is, or None for other kinds."""
    w = patch.weights if isinstance(patch, WeightAdapterBase) and patch.name == "lora" else None
    if w is None or w[3] is not None or not isinstance(weight, QuantizedTensor) or weight._qdata.dtype != torch.int8:
        return None
    scale = torch.atleast_2d(weight._params.scale.float())
    step = scale[: _ROWS if len(scale) == len(weight) else 1].mean()  # else of blocks, or one for all
    change = w[0].flatten(1)[:_ROWS].float() @ w[1].flatten(1).float()  # the host takes those of a 1x1 convolution too
    change *= 1 if w[2] is None else w[2] / w[1].shape[0]
    return (change.square().mean().sqrt() / (step.to(change.device) * _ROUNDING)).item()


class Examined:
    """What a LoRA does on a MODEL: patches that fit, and in sentences what else there is to know."""

    def __init__(self, model, tensors, metadata=None):
        self.model, self.metadata = model, metadata or {}
        self.tensors = comfy.lora_convert.convert_lora(tensors)
        network = model.model.diffusion_model
        # those with values alone: norm2, which has none, is what diffusers calls norm3
        stored = [n for n in network.state_dict() if not n.endswith((".bias", ".weight_scale", ".comfy_quant"))]
        self.layers = [name.removesuffix(".weight") for name in stored] if isinstance(network, WanModel) else []
        key_map = comfy.lora.model_lora_keys_unet(model.model, {})
        self.by_host = self._taken(self.tensors, key_map)
        renamed = lora_names.in_comfyui_names(self.tensors, self.layers)
        names = {renamed.get(name, name): name for name in self.tensors}
        whole, alone = _without_halves({new: self.tensors[old] for new, old in names.items()})
        self.alone = [names[name] for name in alone]
        noting = _Noting(whole)
        loaded = comfy.lora.load_lora(noting, key_map, log_missing=False)
        self.taken = {names[name] for name in noting.taken}
        self.patches, self.misfits, self.kinds, self.ratios = {}, {}, collections.Counter(), {}
        for key, patch in loaded.items():
            self._sort_in(key, patch)
        unfit = tuple(f"{key.removesuffix('.weight')}." for key in self.misfits)
        self.unfit = {old for new, old in names.items() if new.startswith(unfit)}
        self.taken -= self.unfit

    @staticmethod
    def _taken(tensors, key_map):
        noting = _Noting(_without_halves(tensors)[0])
        comfy.lora.load_lora(noting, key_map, log_missing=False)
        return noting.taken

    def _sort_in(self, key, patch):
        name = key if isinstance(key, str) else key[0]
        try:
            weight = original_weight(self.model, name)
        except AttributeError:
            self.misfits[name] = f"{name}: this model has no such values"
            return
        kind, rank, size = _rank_and_size(patch)
        expected = (weight.shape[0], math.prod(weight.shape[1:]))
        if isinstance(key, str) and size is not None and size != expected:
            self.misfits[name] = f"{name.removeprefix(PREFIX)}: expected {list(expected)}, got {list(size)}"
            return
        self.patches[key] = patch
        part = "" if name.endswith(".weight") else f" of a {name.rpartition('.')[2]}"
        place = "norm" if re.search(r"norm[^.]*\.\w+$", name) else weight_format(weight)
        self.kinds[f"{kind}{part}{f' of rank {rank}' if rank else ''} in {place}"] += 1
        ratio = _above_rounding(patch, weight)
        if ratio is not None:
            self.ratios[name.removeprefix(PREFIX)] = ratio

    def _left_over(self):
        """[(why, names)], the most frequent first."""
        known = {*self.taken, *self.unfit, *self.alone}
        rest = [name for name in self.tensors if name not in known]
        reasons = lora_names.why_not(rest, self.layers) if self.layers else {"for no layer of this model": rest}
        reasons = {why: names for why, names in reasons.items() if names}
        if self.alone:
            reasons["of a pair whose other half is missing"] = self.alone
        return sorted(reasons.items(), key=lambda item: -len(item[1]))

    def text(self, title):
        """The report, in lines."""
        layers = {(k if isinstance(k, str) else k[0]).rpartition(".")[0] for k in self.patches}
        lines = [f"{title}: {len(self.taken)} of {len(self.tensors)} tensors act, on {len(layers)} layers."]
        lines += [f"  {count} x {kind}" for kind, count in self.kinds.most_common()]
        if not self.patches:
            lines += ["Nothing of it acts on this model."]
        elif self.taken - self.by_host:
            lines += [
                f"{len(self.taken - self.by_host)} of them are named in a way (diffusers, PEFT and the like) that "
                "ComfyUI's own LoRA nodes do not read for Wan: use the model of this node."
            ]
        for why, names in self._left_over():
            more = ", ..." if len(names) > 3 else ""
            lines += [f"Left out, {len(names)} {why}: {', '.join(names[:3])}{more}"]
        if self.misfits:
            more = ", ..." if len(self.misfits) > 3 else ""
            lines += [f"Left out, {len(self.misfits)} layers of another shape (another size of model?): "]
            lines[-1] += "; ".join(list(self.misfits.values())[:3]) + more
        return "\n".join([*lines, *self._alpha(), *self._quantized(), *self._bypass()])

    def _alpha(self):
        """A line where a file states its alpha beside the tensors, where the host does not look."""
        return [
            f"The file states alpha {alpha:g} at rank {rank}, which ComfyUI does not apply: strength {alpha / rank:g} "
            "is its full strength."
            for alpha, rank in lora_names.stated_alphas(self.metadata)
        ]

    def _quantized(self):
        """Lines on what int8 does to this LoRA."""
        if not self.ratios:
            return []
        ordered = sorted(self.ratios, key=self.ratios.get)
        middle, least = self.ratios[ordered[len(ordered) // 2]], self.ratios[ordered[0]]
        lines = [
            f"{len(ordered)} of the layers are int8. Merged into them the sum is rounded again; at strength 1 the "
            f"change is {middle:.2g} times that rounding (median; least {least:.2g}, in {ordered[0]})."
        ]
        if not self.model.is_dynamic():
            lines[0] += " Where little memory is free, ComfyUI adds it in float and nothing is rounded."
        if middle < 1:
            lines.append("That is little: apply this LoRA before QuantizeW8A8, or by a bypass LoRA node.")
        return lines

    def _bypass(self):
        """Lines on what ComfyUI's bypass LoRA nodes would leave out."""
        adapters = [k for k, patch in self.patches.items() if isinstance(patch, WeightAdapterBase)]
        names = [k.removeprefix(PREFIX) for k in adapters if isinstance(k, str)]
        lines = []
        downs = [name for name in names if name.endswith("ffn.2.weight") and not self._is_ours(name)]
        rows = [name for name in downs if self._is_row(name)]
        if downs and takes_activation():
            lines.append(
                f"Bypass LoRA nodes would act wrongly on {len(downs)} layers, ffn.2, to which this ComfyUI hands the "
                "values before the activation: merge this LoRA."
            )
        elif rows:
            lines.append(
                f"Bypass LoRA nodes would leave out {len(rows)} layers, ffn.2 in the row format, which ComfyUI runs in "
                "one with the activation before it: merge this LoRA."
            )
        if any(kind.startswith("DoRA") for kind in self.kinds):
            lines.append("Bypass LoRA nodes would ignore the magnitudes of this DoRA: merge it.")
        return lines

    def _is_ours(self, name):
        """True where the feed-forward part of a block lets hooks of its second linear act."""
        return isinstance(self.model.model.diffusion_model.get_submodule(name.removesuffix(".2.weight")), FeedForward)

    def _is_row(self, name):
        return weight_format(original_weight(self.model, PREFIX + name)) == "int8_row"
