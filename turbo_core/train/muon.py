"""Muon: momentum made orthogonal, for the matrices of hidden layers. Source: kellerjordan.github.io/posts/muon.

torch.optim.Muon is the same in bfloat16 throughout, which takes longer than the rest of a step where that is emulated.
"""

import math

import torch

from . import precision

_A, _B, _C = 3.4445, -4.7750, 2.0315  # of the quintic that brings singular values near one
_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Steps of length lr along the orthogonalized Nesterov momentum; without weight decay.

    Parameters are matrices [out, in], whole or DTensors; longer than wide ones take steps longer by sqrt(out / in).
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state, keep = self.state[matrix], group["momentum"]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                average = state["momentum_buffer"].lerp_(matrix.grad, 1 - keep)
                update = orthogonalized(matrix.grad.lerp(average, keep))
                out, inputs = matrix.shape
                matrix.add_(update.to(matrix.dtype), alpha=-group["lr"] * math.sqrt(max(1, out / inputs)))


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """U S V^T of a matrix U D V^T [M, N], the singular values S between about 0.7 and 1.2; where D is below some
    hundredths of its largest, less."""
    x = matrix.bfloat16() if precision.has_bfloat16(matrix.device.type) else matrix
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.T if tall else x
