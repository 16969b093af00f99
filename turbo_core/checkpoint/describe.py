"""What a Wan checkpoint is and whether it is whole, from the names, shapes and dtypes of its tensors alone."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import TurboError
from .formats import declared_formats, layer_format, transformer_config
from .names import PROJ_L, is_helper, is_quantizable, looks_like
from .shapes import Sizes, expected_shapes

_SIZES = {(1536, 30): "1.3B", (3072, 30): "5B", (5120, 40): "14B"}  # by (dim, blocks)
_MARKERS = {  # keys that only one kind of Wan model has
    "vace_patch_embedding.weight": "VACE",
    "control_adapter.conv.weight": "Camera",
    "casual_audio_encoder.encoder.final_linear.weight": "S2V",
    "audio_proj.audio_proj_glob_1.layer.bias": "HuMo",
    "face_adapter.fuser_blocks.0.k_norm.weight": "Animate",
    "patch_embedding_mask.weight": "SCAIL-2",
    "patch_embedding_pose.weight": "SCAIL",
    "patch_embedding_global.weight": "WanDancer",
    "ref_conv.weight": "Fun-Control",
    "img_emb.emb_pos": "FLF2V",
}


@dataclass(frozen=True)
class Description:
    """What a checkpoint holds; sizes in channels, `bytes` of the file, `tensors` as stored."""

    path: str
    container: str  # "pth" or "safetensors"
    family: str  # "TurboWan2.1-T2V-1.3B", "Wan2.1-VACE-14B", "Wan (dim 256, 2 blocks)"
    task: str  # "t2v" or "i2v"
    dim: int
    ffn_dim: int
    num_heads: int
    head_dim: int
    num_layers: int
    in_dim: int
    out_dim: int
    text_dim: int
    format: str  # of the ten linears per block: int8_block, int8_row, bf16, fp16, fp32, fp8 or mixed
    has_sla: bool
    tensors: int
    bytes: int
    metadata: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what reading it involved: a prefix removed, a training dump entered, keys left out


def describe(path, container: str, metadata: dict, stored: int, tensors: dict, notes=()) -> Description:
    """Describe and validate tensors under their official names (formats.canonical); no data is read.

    Wan 2.1 T2V-14B and the experts of Wan 2.2 T2V-A14B have the same shapes, as have the two A14B I2V experts: a file
    does not tell which it is. Raises TurboError naming what is missing, extra, of another shape or another family.
    """
    blocks = block_count(tensors, path)
    declared = declared_formats(tensors, metadata, path)
    has_sla = any(name.endswith(f"{PROJ_L}.weight") for name in tensors)
    variant = next((kind for key, kind in _MARKERS.items() if key in tensors), None)
    check_names(tensors, blocks, has_sla, variant, path)
    sizes = read_sizes(tensors, metadata, path)
    check_shapes(tensors, blocks, has_sla, sizes, path)
    formats = {name: layer_format(name, tensors, path) for name in tensors if f"{name}_scale" in tensors}
    formats |= {name: layer_format(name, tensors, path) for name in tensors if is_quantizable(name)}
    for name, kind in declared.items():
        if formats.get(name, kind) != kind:
            raise TurboError(f"{path}: {name} is stated to be {kind} and stored as {formats[name]}. Save it again.")
    used = {kind for name, kind in formats.items() if is_quantizable(name)}
    image_branch = "img_emb.proj.0.weight" in tensors
    return Description(
        path=str(path),
        container=container,
        family=_family(sizes, blocks, has_sla, variant, image_branch),
        task="i2v" if image_branch or sizes.in_dim == sizes.out_dim + 20 else "t2v",
        dim=sizes.dim,
        ffn_dim=sizes.ffn_dim,
        num_heads=sizes.dim // sizes.head_dim,
        head_dim=sizes.head_dim,
        num_layers=blocks,
        in_dim=sizes.in_dim,
        out_dim=sizes.out_dim,
        text_dim=sizes.text_dim,
        format=used.pop() if len(used) == 1 else "mixed",
        has_sla=has_sla,
        tensors=stored,
        bytes=Path(path).stat().st_size,
        metadata=dict(metadata),
        notes=tuple(notes),
    )


def _family(sizes, blocks, has_sla, variant, image_branch) -> str:
    wan, size = ("TurboWan" if has_sla else "Wan"), _SIZES.get((sizes.dim, blocks))
    if size is None:
        return f"{wan}{f' {variant}' if variant else ''} (dim {sizes.dim}, {blocks} blocks)"
    if variant:
        return f"{wan}{'2.2' if variant in ('S2V', 'Animate') else '2.1'}-{variant}-{size}"
    if size == "5B":
        return f"{wan}2.2-TI2V-5B"
    if image_branch:
        return f"{wan}2.1-I2V-{size}"
    if sizes.in_dim == 36:
        return f"{wan}2.2-I2V-A{size}"
    return f"{wan}2.1-T2V-{size}" if sizes.in_dim == 16 else f"{wan}-{size} ({sizes.in_dim} input channels)"


_IMAGE_BRANCH = re.compile(r"cross_attn\.(?:k_img\.(?:weight|bias)|v_img\.(?:weight|bias)|norm_k_img\.weight)")
_MOST_BLOCKS = 200  # far above any Wan model; a higher number in a name is damage


def block_count(tensors: dict, path) -> int:
    """Number of blocks; raises TurboError saying what the file looks like when it is not a Wan model."""
    if "head.modulation" not in tensors or not any(name.startswith("blocks.") for name in tensors):
        kind = looks_like(tensors)
        looks = f"It looks like {kind}." if kind else f"Its first keys are {', '.join(list(tensors)[:3])}."
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
    return f" by itself (it is part {shard[1]} of {shard[2]}: merge the parts into one file first)" if shard else ""


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
        and not is_helper(name)
        and not (name.endswith(".weight_scale") and name.removesuffix("_scale") in expected)
        and not _IMAGE_BRANCH.fullmatch(name.split(".", 2)[2])
    ]
    if extra:
        raise TurboError(
            f"{path}: {_listed(extra, 'not part of any Wan model known here')}. "
            "Expected the official names: use the published file, or save it without these."
        )


def _listed(names: list[str], what: str) -> str:
    blocks = sorted({int(m[1]) for name in names if (m := re.match(r"blocks\.(\d+)\.", name))})
    first = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    numbers = ", ".join(map(str, blocks[:6])) + (", ..." if len(blocks) > 6 else "")
    where = f" (block{'s' if len(blocks) > 1 else ''} {numbers})" if blocks else ""
    return f"{len(names)} {'is' if len(names) == 1 else 'are'} {what}{where}: {first}"


def read_sizes(tensors: dict, metadata: dict, path) -> Sizes:
    """Sizes from the shapes; head_dim from proj_l, else the metadata, else 128. Raises TurboError unless 64 or 128."""
    rank = {"head.modulation": 3, "patch_embedding.weight": 5, "head.head.weight": 2, "blocks.0.ffn.0.weight": 2}
    rank |= {"text_embedding.0.weight": 2, "time_embedding.0.weight": 2}
    for name, axes in rank.items():
        if tensors[name].ndim != axes:
            raise TurboError(f"{path}: {name} has the shape {list(tensors[name].shape)}. Expected {axes} axes.")
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
        raise TurboError(f"{path}: the metadata says {heads!r} heads. Expected a divisor of dim {dim}.")
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
