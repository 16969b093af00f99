"""Networks and data of a training that takes a second."""

import torch

from turbo_core.train.data import Data
from turbo_core.train.experts import Experts
from turbo_core.wan import WanModel


def model(**more) -> WanModel:
    """Always the same weights."""
    torch.manual_seed(0)
    return WanModel(64, 96, 1, 2, text_dim=8, sla=True, **more)


def pair() -> Experts:
    return Experts(model(in_dim=36), model(in_dim=36))


def clips(images: bool = False) -> Data:
    """Six clips of three latent frames, with a caption each."""
    random = torch.Generator().manual_seed(0)
    latents, text = torch.randn(6, 16, 3, 4, 4, generator=random), torch.randn(7, 5, 8, generator=random)
    conditions = torch.randn(6, 20, 3, 4, 4, generator=random) if images else None
    return Data(latents, text, torch.tensor([1, 5, 3, 4, 5, 2, 5]), torch.arange(1, 7)[:, None], conditions)
