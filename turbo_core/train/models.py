"""Transformers in and out of training: float32 copies to train, bfloat16 files that every loader takes."""

import json
from pathlib import Path

import torch

from .. import checkpoint
from ..errors import TurboError
from ..formats import PROJ_L, is_delicate
from ..stream_safetensors import stream_safetensors
from .dit import TrainWan, trainable
from .optim import whole

TINY = {"dim": 128, "ffn_dim": 512, "num_heads": 2, "num_layers": 6, "text_dim": 64}


def new_model(seed: int = 0, **sizes) -> TrainWan:
    """A transformer with random weights, of TinyWan's sizes unless others are given; its last layer is zero."""
    torch.manual_seed(seed)
    model = TrainWan(**(TINY | sizes))
    torch.nn.init.zeros_(model.head.head.weight)
    torch.nn.init.zeros_(model.head.head.bias)
    return model


def load_model(path, device="cpu", sla: bool = False) -> TrainWan:
    """A checkpoint of any readable format to train on; sla adds proj_l where it has none.

    Raises TurboError for a quantized file: its rounding is no start for training.
    """
    state, description = checkpoint.load(path)
    if any(tensor.dtype == torch.int8 for tensor in state.values()):
        raise TurboError(
            f"{path} is quantized ({description.format}), expected float weights: take the unquantized file."
        )
    return trainable(state, description.num_heads, device, sla)


def save_model(model, path, world: str = "") -> Path:
    """Write bfloat16 safetensors under the official names; norms, modulation and proj_l stay float32.

    world: kept in the metadata as turbowan.world, the vocabulary that a model is confined to.
    """
    state = {}
    for name, tensor in whole(model.state_dict()).items():
        exact = is_delicate(name) or PROJ_L in name
        state[name] = tensor.to(torch.float32 if exact else torch.bfloat16).contiguous()
    text_dim = model.text_embedding[0].in_features
    config = json.dumps({"transformer": {"num_heads": model.num_heads, "text_dim": text_dim}})
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
    stream_safetensors(
        path, layout, state.items(), {"format": "pt", "config": config} | ({checkpoint.WORLD: world} if world else {})
    )
    return Path(path)
