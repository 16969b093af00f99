"""Optimizers, schedules and the moving average."""

import math

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import TurboError
from .muon import Muon


def check_finite(what: str, value: float) -> None:
    """Raise TurboError for NaN and infinity, before anything is updated by it or saved."""
    if not math.isfinite(value):
        raise TurboError(
            f"{what} is {value}. Lower the learning rate and start again: it goes on from its last checkpoint."
        )


class Both:
    """Muon for the matrices of hidden layers, AdamW for everything else, as one optimizer.

    is_matrix: callable (name, tensor), which decides; kernels of convolutions count as matrices [out, inputs].
    """

    def __init__(self, model, muon_lr: float, adam_lr: float, is_matrix=lambda name, tensor: False):
        # two experts are parts that a step may leave alone
        self.parts = [[p for p in part.parameters() if p.requires_grad] for part in getattr(model, "parts", [])]
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if is_matrix(name, p)]
        others = [p for name, p in named if not is_matrix(name, p)]
        self.parameters = others + matrices
        # Muon takes matrices only: kernels come to it as a view
        self.views = [(p, p if p.ndim == 2 else torch.nn.Parameter(p.detach().flatten(1))) for p in matrices]
        self.optimizers, self.rates = [], []
        if others:
            self.optimizers.append(torch.optim.AdamW(others, adam_lr, betas=(0.9, 0.99), weight_decay=0.0))
            self.rates.append(adam_lr)
        if matrices:
            flat = [view for _, view in self.views]
            self.optimizers.append(Muon(flat, muon_lr))
            self.rates.append(muon_lr)

    def step(self, factor: float, clip: float = 1.0) -> float:
        """One update at factor times the learning rates; returns the norm of the gradient before clipping.

        A part whose gradient is zero keeps its weights: Muon would go on at full length along its momentum. Raises
        TurboError where the norm is not finite: clipping by it would make NaN of every weight.
        """
        for part in self.parts:
            gradients = [p.grad for p in part if p.grad is not None]
            if gradients and not whole(torch.nn.utils.get_total_norm(gradients)):
                for parameter in part:
                    parameter.grad = None
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, clip)).item()
        check_finite("the gradient", norm)
        for parameter, view in self.views:
            if view is not parameter:
                view.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        for optimizer, rate in zip(self.optimizers, self.rates):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def state_dict(self):
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state):
        for i, optimizer in enumerate(self.optimizers):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            # moments are spread before the optimizer moves them to a device
            moments = {
                at: {name: _moment(value, parameters[at]) for name, value in stored.items()}
                for at, stored in state[str(i)]["state"].items()
            }
            optimizer.load_state_dict(state[str(i)] | {"state": moments})


def in_blocks(name: str, tensor) -> bool:
    """The matrices of a transformer that Muon is meant for."""
    return tensor.ndim == 2 and "blocks." in name


def schedule(step: int, steps: int, warmup: int = 20, decay_from: float = 0.6, floor: float = 0.02) -> float:
    """Factor of the learning rate: linear warm-up, constant, then linear decay."""
    done = step / max(steps, 1)
    decay = 1.0 if done < decay_from else max(floor, (1 - done) / (1 - decay_from))
    return min(1.0, (step + 1) / warmup) * decay


class Average:
    """The moving average of a model's parameters, whole or sharded as those are."""

    def __init__(self, model):
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def follow(self, model, decay: float) -> None:
        """average = decay * average + (1 - decay) * model."""
        for name, parameter in model.named_parameters():
            self.tensors[name].lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def copy_into(self, model):
        """Give a model the averaged weights, and return it."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.tensors[name])
        return model

    def state_dict(self):
        return self.tensors

    def load_state_dict(self, state):
        self.tensors = {name: like(state[name], tensor).clone() for name, tensor in self.tensors.items()}


def _moment(value, parameter):
    fits = isinstance(value, torch.Tensor) and value.shape == parameter.shape
    return like(value, parameter) if fits else value


def like(whole: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the device of another one, spread over the processes as that one is."""
    whole = whole.to(tensor.device)
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else whole


def whole(state, keep: bool = True):
    """A state dict, however nested, with whole tensors on the CPU: every process must call it.

    keep False: None in place of each tensor, in processes that only help another one to gather them.
    """
    if isinstance(state, dict):
        return {name: whole(value, keep) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value, keep) for value in state)
    if isinstance(state, DTensor):
        state = state.full_tensor()
    if not isinstance(state, torch.Tensor):
        return state
    return state.detach().cpu() if keep else None
