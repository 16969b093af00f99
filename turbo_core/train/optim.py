"""Optimizers, schedules and the moving average."""

import copy

import torch


class Both:
    """Muon for the matrices of hidden layers, AdamW for everything else, as one optimizer.

    is_matrix: callable (name, tensor), which decides; kernels of convolutions count as matrices [out, inputs].
    """

    def __init__(self, model, muon_lr: float, adam_lr: float, is_matrix=lambda name, tensor: False):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        matrices = [p for name, p in named if is_matrix(name, p)]
        others = [p for name, p in named if not is_matrix(name, p)]
        self.parameters = others + matrices
        # torch's Muon takes matrices only: kernels come to it as a view
        self.views = [(p, p if p.ndim == 2 else torch.nn.Parameter(p.detach().flatten(1))) for p in matrices]
        self.optimizers, self.rates = [], []
        if others:
            self.optimizers.append(torch.optim.AdamW(others, adam_lr, betas=(0.9, 0.99), weight_decay=0.0))
            self.rates.append(adam_lr)
        if matrices:
            flat = [view for _, view in self.views]
            self.optimizers.append(torch.optim.Muon(flat, muon_lr, weight_decay=0.0))
            self.rates.append(muon_lr)

    def step(self, factor: float, clip: float = 1.0) -> float:
        """One update at factor times the learning rates; returns the norm of the gradient before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        for parameter, view in self.views:
            if view is not parameter:
                view.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        for optimizer, rate in zip(self.optimizers, self.rates):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None
        return norm.item()

    def state_dict(self):
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state):
        for i, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[str(i)])


def in_blocks(name: str, tensor) -> bool:
    """The matrices of a transformer that Muon is meant for."""
    return tensor.ndim == 2 and "blocks." in name


def schedule(step: int, steps: int, warmup: int = 20, decay_from: float = 0.6, floor: float = 0.02) -> float:
    """Factor of the learning rate: linear warm-up, constant, then linear decay."""
    done = step / max(steps, 1)
    decay = 1.0 if done < decay_from else max(floor, (1 - done) / (1 - decay_from))
    return min(1.0, (step + 1) / warmup) * decay


def average_of(model):
    """A frozen copy of a model to keep the moving average in."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def follow(average, model, decay: float) -> None:
    """average = decay * average + (1 - decay) * model."""
    ours, theirs = list(average.parameters()), [p.detach() for p in model.parameters()]
    torch._foreach_lerp_(ours, theirs, 1 - decay)
