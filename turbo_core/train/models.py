"""Transformers in and out of training: float32 copies to train, bfloat16 files that every loader takes."""

import functools
import json
import logging

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recomputed

from .. import checkpoint
from ..checkpoint.names import PROJ_L, is_delicate
from ..checkpoint.write import stream_safetensors
from ..errors import TurboError
from ..selfcheck import prove
from ..wan import WanModel
from . import engine, precision
from .experts import Experts
from .optim import whole

TINY = {"dim": 128, "ffn_dim": 512, "num_heads": 2, "num_layers": 6, "text_dim": 64}


def new_model(seed: int = 0, **sizes) -> WanModel:
    """A transformer with random weights, of TinyWan's sizes unless others are given; its last layer is zero."""
    torch.manual_seed(seed)
    model = WanModel(**(TINY | sizes))
    torch.nn.init.zeros_(model.head.head.weight)
    torch.nn.init.zeros_(model.head.head.bias)
    return keep_scores(model)


def trainable(state: dict, num_heads=None, device="cpu", sla=False) -> WanModel:
    """A model in float32 with the weights of a canonical state dict; sla adds proj_l, all zeros, where it lacks."""
    prove(device)
    model = WanModel.from_state_dict(state, torch.float32, device, num_heads)
    if sla and not model.has_sla:
        size = model.dim // model.num_heads
        blank = {"weight": torch.zeros(size, size), "bias": torch.zeros(size)}
        proj_l = [f"blocks.{index}.{PROJ_L}" for index in range(len(model.blocks))]
        state = state | {f"{name}.{part}": tensor for name in proj_l for part, tensor in blank.items()}
        model = WanModel.from_state_dict(state, torch.float32, device, model.num_heads)
    # the weights are mapped to their file: copies may be written to
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return keep_scores(model).train().requires_grad_(True)


def train_dense(model: torch.nn.Module) -> None:
    """Leave proj_l alone: dense attention does not use it, and processes wait for every gradient that is due."""
    for name, parameter in model.named_parameters():
        if PROJ_L in name:
            parameter.requires_grad_(False)


def recompute_blocks(model: WanModel) -> None:
    """Recompute each block in the backward pass: less memory, a third more time."""
    for block in model.blocks:
        block.forward = functools.partial(recomputed, block.forward, use_reentrant=False, preserve_rng_state=False)


def compile_blocks(*models) -> None:
    """Have torch.compile fuse what each block computes: a sixth less time on a CPU, for a minute when a size is first
    seen. Changes nothing where torch.compile does not work, and says so."""
    torch.compiler.reset()  # what an earlier stage compiled counts towards its limit of sizes
    for model in models if compiles(next(models[0].parameters()).device.type) else ():
        for block in model.blocks:
            block.compile(dynamic=False)


@functools.cache
def compiles(kind: str) -> bool:
    """True where torch.compile works on this kind of device: it needs a compiler, and Python's headers."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=kind))
    except Exception as error:  # of any kind: it runs programs of this machine
        logging.warning("TurboWan: torch.compile does not work here, training goes on without: %s", error)
        return False
    return True


def keep_scores(model: WanModel) -> WanModel:
    """Have dense attention on a CPU keep its scores where that is faster, see block.Attention; returns the model."""
    for block in model.blocks:
        block.self_attn.keeps_scores = block.cross_attn.keeps_scores = precision.has_bfloat16("cpu")
    return model


def with_image(model: WanModel) -> WanModel:
    """A text-to-video model that also takes the 20 channels of an image, see pipeline.encode_image, and is blind to
    them so far."""
    state = model.state_dict()
    blind = F.pad(state["patch_embedding.weight"], (0, 0, 0, 0, 0, 0, 0, 20))
    return trainable(state | {"patch_embedding.weight": blind}, model.num_heads, blind.device)


def load_model(path, device="cpu", sla: bool = False) -> WanModel:
    """A checkpoint of any readable format to train on; sla adds proj_l where it has none.

    Raises TurboError for a quantized file: its rounding is no start for training.
    """
    state, description = checkpoint.load(path)
    if any(tensor.dtype == torch.int8 for tensor in state.values()):
        raise TurboError(
            f"{path} is quantized ({description.format}), expected float weights: take the unquantized file."
        )
    return trainable(state, description.num_heads, device, sla)


def load_models(paths, boundary: float, device="cpu", sla=False, checkpointing=False) -> WanModel | Experts:
    """One checkpoint, or the high- and the low-noise expert's, to train on; see load_model."""
    loaded = [load_model(path, device, sla) for path in paths]
    for model in loaded if checkpointing else ():
        recompute_blocks(model)
    return Experts(*loaded, boundary) if loaded[1:] else loaded[0]


def save_models(model: WanModel | Experts, paths, world: str = "") -> None:
    """Write a model to its path, or experts to theirs, high noise first; see save_model."""
    for part, path in zip(model.parts if isinstance(model, Experts) else [model], paths):
        save_model(part, path, world)


def save_model(model: WanModel, path, world: str = "") -> None:
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
