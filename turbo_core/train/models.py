"""Transformers in and out of training: float32 copies to train, bfloat16 files that every loader takes."""

import json

import torch
import torch.nn.functional as F

from .. import checkpoint
from ..checkpoint.names import PROJ_L, is_delicate
from ..checkpoint.write import stream_safetensors
from ..errors import TurboError
from . import engine
from .dit import TrainWan, trainable
from .experts import Experts
from .optim import whole

TINY = {"dim": 128, "ffn_dim": 512, "num_heads": 2, "num_layers": 6, "text_dim": 64}


def new_model(seed: int = 0, **sizes) -> TrainWan:
    """A transformer with random weights, of TinyWan's sizes unless others are given; its last layer is zero."""
    torch.manual_seed(seed)
    model = TrainWan(**(TINY | sizes))
    torch.nn.init.zeros_(model.head.head.weight)
    torch.nn.init.zeros_(model.head.head.bias)
    return model


def with_image(model: TrainWan) -> TrainWan:
    """A text-to-video model that also takes the 20 channels of an image, see pipeline.encode_image, and is blind to
    them so far."""
    state = model.state_dict()
    blind = F.pad(state["patch_embedding.weight"], (0, 0, 0, 0, 0, 0, 0, 20))
    return trainable(state | {"patch_embedding.weight": blind}, model.num_heads, blind.device)


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


def load_models(paths, boundary: float, device="cpu", sla=False, checkpointing=False) -> TrainWan | Experts:
    """One checkpoint, or the high- and the low-noise expert's, to train on; see load_model."""
    loaded = [load_model(path, device, sla) for path in paths]
    for model in loaded:
        model.checkpointing = checkpointing
    return Experts(*loaded, boundary) if loaded[1:] else loaded[0]


def save_models(model: TrainWan | Experts, paths, world: str = "") -> None:
    """Write a model to its path, or experts to theirs, high noise first; see save_model."""
    for part, path in zip(model.parts if isinstance(model, Experts) else [model], paths):
        save_model(part, path, world)


def save_model(model: TrainWan, path, world: str = "") -> None:
    """Write bfloat16 safetensors under the official names; norms, modulation and proj_l stay float32.

    Where processes share the weights all of them must call it; the first one writes. world: kept in the metadata as
    turbowan.world, the vocabulary that a model is confined to.
    """
    state, layout = model.state_dict(), {}
    for name, tensor in state.items():
        exact = is_delicate(name) or PROJ_L in name
        layout[name] = (torch.float32 if exact else torch.bfloat16), tuple(tensor.shape)
    text_dim = model.text_embedding[0].in_features
    config = json.dumps({"transformer": {"num_heads": model.num_heads, "text_dim": text_dim}})
    metadata = {"format": "pt", "config": config} | ({checkpoint.WORLD: world} if world else {})
    if engine.rank() == 0:
        tensors = ((name, whole(tensor).to(layout[name][0]).contiguous()) for name, tensor in state.items())
        stream_safetensors(path, layout, tensors, metadata)
    else:
        for tensor in state.values():  # shards are gathered by all processes together
            whole(tensor, keep=False)
