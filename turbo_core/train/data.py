"""What the transformer is trained on: latents of clips and embeddings of their captions, encoded once, in one file."""

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from ..checkpoint import inspect
from ..checkpoint.formats import is_finite
from ..checkpoint.write import write_safetensors
from ..errors import TurboError
from ..pipeline.inputs import check_experts, check_model
from ..pipeline.text import TEXT_LENGTH, clean_prompt, encode_text
from ..wan.model import PATCH

_NAMES = ("latents", "text", "lengths", "captions_of")
_SMALL = ("latents", "text", "images")  # in bfloat16
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_AGAIN = "Make it again with turbo-core train data."


class Data(NamedTuple):
    """latents [N, 16, T, H, W] normalized; text [M, tokens, text_dim], of which lengths [M] are a caption's;
    captions_of int64 [N, k]: rows of text that describe each clip. Row 0 of text is the empty caption.
    images [N, 20, T, H, W]: what an image-to-video model is given of each clip, see pipeline.encode_image; None for
    text-to-video."""

    latents: torch.Tensor
    text: torch.Tensor
    lengths: torch.Tensor
    captions_of: torch.Tensor
    images: torch.Tensor | None = None


def save(data: Data, path) -> None:
    """Write a data set as safetensors, latents, text and images in bfloat16."""
    state = {name: tensor.contiguous() for name, tensor in data._asdict().items() if tensor is not None}
    state |= {name: state[name].to(torch.bfloat16) for name in _SMALL if name in state}
    write_safetensors(path, state, {"format": "pt"})


def load(path) -> Data:
    """Read a data set. Raises TurboError when the file is missing or holds something else."""
    if not os.path.isfile(path):
        raise TurboError(f"data: there is no file {path}. Make it with turbo-core train data.")
    try:
        with safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise TurboError(f"data: {path} cannot be read ({error}). Make it again.") from error
    if set(found) - {"images"} != set(_NAMES) or found["latents"].ndim != 5 or found["text"].ndim != 3:
        raise TurboError(f"data: {path} is no training data, expected the tensors {', '.join(_NAMES)}.")
    data = Data(**found)
    _check_parts(data, path)
    return data


def _check_parts(data: Data, path) -> None:
    """Raise TurboError unless the parts fit together, as every batch takes for granted."""
    clips, captions, tokens = len(data.latents), *data.text.shape[:2]
    for name, tensor in data._asdict().items():
        if tensor is None:
            continue
        floats = name in _SMALL
        if tensor.numel() == 0 or tensor.dtype not in (_FLOATS if floats else (torch.int64,)):
            wanted = "float16, bfloat16 or float32" if floats else "int64"
            raise TurboError(
                f"data: {path}: {name} is {tensor.dtype} {list(tensor.shape)}, expected {wanted}. {_AGAIN}"
            )
        if floats and not is_finite(tensor):
            raise TurboError(f"data: {path}: {name} holds NaN or infinity. {_AGAIN}")
    shapes = {name: list(tensor.shape) for name, tensor in data._asdict().items() if tensor is not None}
    fits = shapes["lengths"] == [captions] and len(shapes["captions_of"]) == 2 and shapes["captions_of"][0] == clips
    if data.images is not None:
        images, latents = shapes["images"], shapes["latents"]
        fits = fits and len(images) == 5 and images[0] == clips and images[2:] == latents[2:]
    if not fits:
        raise TurboError(f"data: {path}: the shapes {shapes} do not fit together. {_AGAIN}")
    for name, most in (("lengths", tokens), ("captions_of", captions - 1)):
        low, high = (edge.item() for edge in getattr(data, name).aminmax())
        if low < 0 or high > most:
            raise TurboError(f"data: {path}: {name} goes from {low} to {high}, expected 0 to {most}. {_AGAIN}")


def check_fits(data: Data, model, low=None) -> None:
    """Raise TurboError unless the transformer in the file `model`, with low the pair of experts, can be trained on what
    the data holds."""
    described = inspect(model)
    check_model(described)
    if low is not None:
        check_experts(described, inspect(low))
    elif described.in_dim == 36:
        raise TurboError(
            f"{model} is one of two experts ({described.family}), trained for a part of the times: give the low-noise "
            "one too, --model-low and --output-low."
        )
    channels, text_dim = data.latents.shape[1], data.text.shape[2]
    if data.images is not None:
        channels += data.images.shape[1]
    if (described.in_dim, described.text_dim) != (channels, text_dim):
        raise TurboError(
            f"{model} takes {described.in_dim} latent channels and text of {described.text_dim}, the data has "
            f"{channels} and {text_dim}: encode it with this model's own VAE and text encoder, with --image for an "
            "image-to-video model (36 channels) and without for others (16)."
        )


def batch(data: Data, count: int, random: torch.Generator, dropout=0.0, kept=None, device="cpu"):
    """(latents, what a WanModel is told about them) of random clips.

    They are told, by name: context and context_bias of one of the clip's captions, or with the probability dropout of
    the empty one; y, where there are images; places, where the batch shows a part of each clip only. kept: (frames,
    rows, columns) of patches to show, see some_places, default all.
    """
    rows = torch.randint(len(data.latents), (count,), generator=random)
    wording = torch.randint(data.captions_of.shape[1], (count,), generator=random)
    empty = torch.rand(count, generator=random) < dropout
    captions = data.captions_of[rows, wording].masked_fill(empty, 0)
    told = text_rows(data, captions, device)
    shown = {"latents": data.latents[rows]} | ({} if data.images is None else {"y": data.images[rows]})
    if kept is not None:
        _, _, frames, height, width = data.latents.shape
        told["places"] = some_places((frames, height // PATCH[1], width // PATCH[2]), kept, random)
        shown = {name: patches_at(part, told["places"]) for name, part in shown.items()}
    shown = {name: part.float().to(device) for name, part in shown.items()}
    return shown.pop("latents"), told | shown


def some_places(grid, kept, random: torch.Generator):
    """Which (frames, rows, columns) of a grid of patches a batch shows: `kept` of each, at least one, in order.

    Frames are the first one, which is one picture and unlike the others, and a random choice of the rest; rows and
    columns are a random choice. The model that has learnt such parts, each with its own places, knows the whole: they
    cost a fraction, attention with its square.
    """

    def choose(total, count, first):
        if count >= total:
            return torch.arange(total)
        others = first + torch.randperm(total - first, generator=random)[: count - first].sort().values
        return torch.cat([torch.arange(first), others])

    return tuple(
        choose(total, count, int(axis == 0)) for axis, (total, count) in enumerate(zip(grid, kept, strict=True))
    )


def patches_at(latents, places):
    """The patches of latents [B, C, T, H, W] at places."""
    frames, rows, columns = places
    rows, columns = (
        (size * place[:, None] + torch.arange(size)).flatten() for size, place in zip(PATCH[1:], (rows, columns))
    )
    return latents[:, :, frames][:, :, :, rows][..., columns]


def text_rows(data: Data, rows: torch.Tensor, device="cpu"):
    """{"context": [rows, tokens + 1, text_dim], "context_bias": [rows, tokens + 1]} of rows of text, as a WanModel is
    told them.

    In a video's making a prompt is padded with zeros to 512 tokens. All of those are the same key: it is given once,
    with the logarithm of their number as its bias, and what else lies behind the prompt has no weight.
    """
    lengths, place = data.lengths[rows, None], torch.arange(data.text.shape[1] + 1)
    pads = (TEXT_LENGTH - lengths).clamp_min(0).log()
    bias = torch.where(place < lengths, 0.0, torch.where(place == lengths, pads, -torch.inf))
    context = F.pad(data.text[rows].float(), (0, 0, 0, 1)) * (place < lengths)[..., None]
    return {"context": context.to(device), "context_bias": bias.to(device)}


def encode_captions(encoder, tokenize, captions: list[str]):
    """(text [M, tokens, text_dim], lengths [M]): as many tokens as the longest of them has, and a model is shown."""
    lengths = torch.tensor([len(tokenize(clean_prompt(caption))) for caption in captions])
    longest = min(TEXT_LENGTH, int(lengths.max()))
    parts = [encode_text(encoder, tokenize, captions[i : i + 64], longest) for i in range(0, len(captions), 64)]
    return torch.cat(parts).clone(), lengths.clamp_max(longest)
