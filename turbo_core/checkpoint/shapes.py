"""The names and shapes that a Wan model must have, read off a file's tensors and checked against them."""

import re
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import TurboError, quoted, shown
from ..wan import QUANTIZED_LINEARS
from .formats import transformer_config
from .names import PROJ_L, is_helper, looks_like
from .others.comfyui import is_attention
from .others.sharded import INDEX

_IMAGE_BRANCH = re.compile(r"cross_attn\.(?:[kv]_img\.(?:weight(?:_scale)?|bias)|norm_k_img\.weight)")
_MOST_BLOCKS = 200  # far above any Wan model; a higher number in a name is damage


class Sizes(NamedTuple):
    """Channels of a Wan model."""

    dim: int
    in_dim: int
    out_dim: int
    ffn_dim: int
    text_dim: int
    freq_dim: int
    head_dim: int


_ANY = Sizes(*[1] * 7)


def expected_shapes(blocks: int, has_sla: bool, sizes: Sizes = _ANY) -> dict[str, tuple[int, ...]]:
    """{name: shape} of a Wan model; without sizes only the names mean something."""
    dim, in_dim, out_dim, ffn, text, freq, head_dim = sizes
    shapes = {
        "patch_embedding.weight": (dim, in_dim, 1, 2, 2),
        "patch_embedding.bias": (dim,),
        "head.modulation": (1, 2, dim),
    }

    def linear(name, rows, cols):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, cols), (rows,)

    linear("text_embedding.0", dim, text)
    linear("text_embedding.2", dim, dim)
    linear("time_embedding.0", dim, freq)
    linear("time_embedding.2", dim, dim)
    linear("time_projection.1", 6 * dim, dim)
    linear("head.head", 4 * out_dim, dim)
    for n in range(blocks):
        for layer in QUANTIZED_LINEARS:
            linear(f"blocks.{n}.{layer}", ffn if layer == "ffn.0" else dim, ffn if layer == "ffn.2" else dim)
        for attention in ("self_attn", "cross_attn"):
            shapes[f"blocks.{n}.{attention}.norm_q.weight"] = (dim,)
            shapes[f"blocks.{n}.{attention}.norm_k.weight"] = (dim,)
        shapes[f"blocks.{n}.norm3.weight"] = shapes[f"blocks.{n}.norm3.bias"] = (dim,)
        shapes[f"blocks.{n}.modulation"] = (1, 6, dim)
        if has_sla:
            linear(f"blocks.{n}.{PROJ_L}", head_dim, head_dim)
    return shapes


def block_count(tensors: dict, path) -> int:
    """Number of blocks; raises TurboError saying what the file looks like when it is not a Wan model."""
    if "head.modulation" not in tensors or not any(name.startswith("blocks.") for name in tensors):
        kind, first = looks_like(tensors), ", ".join(shown(name, 50) for name in list(tensors)[:2])
        looks = f"It looks like {kind}." if kind else f"Its first keys are {first}."
        raise TurboError(
            f"{path} is not a Wan diffusion model{_shard_hint(path)}. {looks} Expected keys such as head.modulation "
            "and blocks.0.self_attn.q.weight: choose a TurboWan or Wan 2.1 / 2.2 checkpoint."
        )
    numbers = {int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d{1,9})\.", name))}
    if not numbers or max(numbers) >= _MOST_BLOCKS:
        raise TurboError(f"{path}: block numbers up to {max(numbers, default=None)}. Expected 0 to {_MOST_BLOCKS - 1}.")
    return 1 + max(numbers)


def _shard_hint(path) -> str:
    shard = re.search(r"-(\d+)-of-(\d+)\.", Path(path).name)
    if shard is None:
        return ""
    index = f"{Path(path).name[: shard.start()]}{INDEX}"
    return f" by itself (it is part {shard[1]} of {shard[2]}: open {index} beside it, or merge the parts into one file)"


def check_names(tensors: dict, blocks: int, has_sla: bool, variant: str | None, path) -> None:
    """Raise TurboError when keys are missing, or a block of a plain model holds keys that no Wan model has."""
    expected = expected_shapes(blocks, has_sla)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise TurboError(
            f"{path} is incomplete{_shard_hint(path)}: of {len(expected)} tensors of a Wan model with {blocks} blocks "
            f"{_listed(missing, 'missing')}. Download or save it again."
        )
    if variant:  # its blocks carry more than the plain model's; they are passed through
        return
    extra = [
        name
        for name in tensors
        if name.startswith("blocks.")
        and name not in expected
        and not (is_helper(name) or is_attention(name))
        and not (name.endswith(".weight_scale") and name.removesuffix("_scale") in expected)
        and not _IMAGE_BRANCH.fullmatch(name.split(".", 2)[-1])
    ]
    if extra:
        raise TurboError(
            f"{path}: {_listed(extra, 'not part of any Wan model known here')}. "
            "Expected the official names: use the published file, or save it without these."
        )


def _listed(names: list[str], what: str) -> str:
    blocks = sorted({int(m[1]) for name in names if (m := re.match(r"blocks\.(\d{1,9})\.", name))})
    first = ", ".join(map(shown, names[:4])) + (", ..." if len(names) > 4 else "")
    numbers = ", ".join(map(str, blocks[:6])) + (", ..." if len(blocks) > 6 else "")
    where = f" (block{'s' if len(blocks) > 1 else ''} {numbers})" if blocks else ""
    return f"{len(names)} {'is' if len(names) == 1 else 'are'} {what}{where}: {first}"


def without_packing(tensors: dict, packed, metadata: dict, path) -> dict:
    """The tensors with each weight in `packed`, whose format is not read here and may hold several numbers in a byte,
    as an empty one of the width that a Wan model has there, and without the other parts of these layers."""
    if not packed:
        return tensors
    layers = {name.removesuffix(".weight") for name in packed}
    result = {n: t for n, t in tensors.items() if n.endswith(".bias") or n.rpartition(".")[0] not in layers}
    dim, ffn = tensors["head.modulation"].shape[-1:], tensors.get("blocks.0.ffn.0.weight", torch.empty(0)).shape[:1]
    text = transformer_config(metadata, path).get("text_dim")
    text = text if isinstance(text, int) and 0 < text < 1 << 20 else 4096
    widths = {"ffn.2": ffn, "text_embedding.0": (text,), "time_embedding.0": (256,)}
    for name in (n for n in packed if n in tensors):
        kind = ".".join(name.split(".")[-3:-1])
        shape = (*tensors[name].shape[:1], *widths.get(kind, dim))
        result[name] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    return result


def read_sizes(tensors: dict, metadata: dict, path) -> Sizes:
    """Sizes from the shapes; head_dim from proj_l, else the metadata, else 128. Raises TurboError unless 64 or 128."""
    rank = {"head.modulation": 3, "patch_embedding.weight": 5, "head.head.weight": 2, "blocks.0.ffn.0.weight": 2}
    rank |= {"text_embedding.0.weight": 2, "time_embedding.0.weight": 2}
    for name, axes in rank.items():
        if tensors[name].ndim != axes:
            raise TurboError(f"{path}: {name} has the shape {list(tensors[name].shape)}. Expected {axes} axes.")
        if 0 in tensors[name].shape:
            raise TurboError(f"{path}: {name} is empty, {list(tensors[name].shape)}. Expected weights.")
    dim = tensors["head.modulation"].shape[-1]
    return Sizes(
        dim,
        tensors["patch_embedding.weight"].shape[1],
        tensors["head.head.weight"].shape[0] // 4,
        tensors["blocks.0.ffn.0.weight"].shape[0],
        tensors["text_embedding.0.weight"].shape[1],
        tensors["time_embedding.0.weight"].shape[1],
        _head_dim(tensors, dim, transformer_config(metadata, path), path),
    )


def _head_dim(tensors, dim, config, path) -> int:
    heads, proj_l = config.get("num_heads"), tensors.get(f"blocks.0.{PROJ_L}.weight")
    if heads is not None and (not isinstance(heads, int) or heads < 1 or dim % heads):
        raise TurboError(f"{path}: the metadata says {quoted(heads)} heads. Expected a divisor of dim {dim}.")
    if proj_l is not None:
        head_dim, origin = proj_l.shape[0] if proj_l.ndim else 0, f"proj_l is {list(proj_l.shape)}, which makes it"
        if heads is not None and heads * head_dim != dim:
            raise TurboError(f"{path}: proj_l is for heads of {head_dim}, the metadata for {dim // heads}. Fix either.")
    elif heads is not None:
        head_dim, origin = dim // heads, f"the metadata says {heads} heads, which makes it"
    else:
        head_dim, origin = 128, "without proj_l or metadata it is"
    if head_dim not in (64, 128) or dim % head_dim:
        raise TurboError(
            f"{path}: unsupported head_dim. Expected 64 or 128, dividing dim {dim}; {origin} {head_dim}. "
            "Use a Wan or TurboWan checkpoint, or state num_heads in the metadata `config`."
        )
    return head_dim


def check_types(tensors: dict, names, path) -> None:
    """Raise TurboError for a tensor of a Wan model that is no float and has no scale to make it one."""
    for name in names:
        dtype = tensors[name].dtype
        if not dtype.is_floating_point and not (dtype == torch.int8 and f"{name}_scale" in tensors):
            raise TurboError(f"{path}: {name} is stored as {dtype}. Expected floats: use the published file.")


def check_shapes(tensors: dict, blocks: int, has_sla: bool, sizes: Sizes, path) -> None:
    """Raise TurboError naming the first tensor whose shape is not that of a Wan model of these sizes."""
    wrong = [
        (name, shape, tuple(tensors[name].shape))
        for name, shape in expected_shapes(blocks, has_sla, sizes).items()
        if tuple(tensors[name].shape) != shape
    ]
    if wrong:
        name, expected, got = wrong[0]
        more = f" ({len(wrong) - 1} more tensors do not fit either)" if len(wrong) > 1 else ""
        raise TurboError(
            f"{path}: {name} has the shape {list(got)}, expected {list(expected)} in a Wan model of dim {sizes.dim}"
            f"{more}. The file is damaged or was edited: use the published one."
        )
