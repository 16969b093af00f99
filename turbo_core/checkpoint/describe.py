"""What a Wan checkpoint is, from the names, shapes and dtypes of its tensors alone."""

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import TurboError, shown
from .formats import check_scale_names, declared_formats, layer_format, transformer_config
from .names import PROJ_L, is_quantizable
from .others.comfyui import attention_settings, comfyui_reads
from .others.sharded import files_of
from .read import SAFETENSORS_SUFFIXES
from .shapes import (
    block_count,
    check_names,
    check_shapes,
    check_types,
    expected_shapes,
    read_sizes,
    without_packing,
)

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
    format: str  # of the ten linears per block: int8_block, int8_row, bf16, fp16, fp32, fp8, mixed, or as in `foreign`
    has_sla: bool
    tensors: int
    bytes: int
    metadata: dict = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what reading it involved: a prefix removed, a training dump entered, keys left out
    attention: dict[str, str] = field(default_factory=dict)  # {module: JSON} of the attention it asks ComfyUI for
    comfyui: bool = False  # its own loader reads it as it is read here, but for proj_l
    foreign: dict[str, str] = field(default_factory=dict)  # {weight: format} of those that are not read here: "nvfp4"
    variant: str | None = None  # what makes it more than the plain network: "VACE", "an image branch", "causal"


def describe(path, container: str, metadata: dict, stored: dict, tensors: dict, notes=()) -> Description:
    """Describe and validate tensors, as stored and under their official names (names.canonical); no weight is read.

    Wan 2.1 T2V-14B and the experts of Wan 2.2 T2V-A14B have the same shapes, as have the two A14B I2V experts: a file
    does not tell which it is. Raises TurboError naming what is missing, extra, of another shape or another family.
    """
    blocks = block_count(tensors, path)
    declared, foreign = declared_formats(tensors, metadata, path)
    attention, asked = attention_settings(tensors)
    official = tensors
    tensors = without_packing(tensors, foreign, metadata, path)
    has_sla = any(name.endswith(f"{PROJ_L}.weight") for name in tensors)
    variant = next((kind for key, kind in _MARKERS.items() if key in tensors), None)
    check_scale_names(tensors, path)
    check_names(tensors, blocks, has_sla, variant, path)
    sizes = read_sizes(tensors, metadata, path)
    check_shapes(tensors, blocks, has_sla, sizes, path)
    formats = stored_formats(tensors, path) | foreign
    check_types(tensors, expected_shapes(blocks, has_sla), path)
    for name, kind in declared.items():
        if formats.get(name, kind) != kind:
            raise TurboError(
                f"{path}: {shown(name)} is stated to be {kind} and stored as {formats[name]}. Save it again."
            )
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
        tensors=len(stored),
        bytes=sum(file.stat().st_size for file in files_of(path)),
        metadata=dict(metadata),
        notes=(*notes, *asked, *_foreign_notes(foreign)),
        attention=attention,
        comfyui=container == "safetensors"
        and Path(path).suffix.lower() in SAFETENSORS_SUFFIXES  # by which it chooses the reader
        and comfyui_reads(stored, official, formats, declared.keys() | foreign.keys()),
        foreign=foreign,
        variant=variant or ("an image branch" if image_branch else _stated_kind(metadata, path)),
    )


def _stated_kind(metadata: dict, path) -> str | None:
    """What only the metadata tell, in ComfyUI's words."""
    stated = transformer_config(metadata, path)
    kind = stated.get("model_type")
    return "causal" if stated.get("causal_ar") else kind if kind not in (None, "t2v", "i2v") else None


def stored_formats(tensors: dict, path) -> dict[str, str]:
    """{name: layer_format} of the weights that are, or can be, quantized."""
    return {n: layer_format(n, tensors, path) for n in tensors if is_quantizable(n) or f"{n}_scale" in tensors}


def _foreign_notes(foreign: dict[str, str]) -> list[str]:
    kinds = ", ".join(sorted(set(foreign.values())))
    return [f"{len(foreign)} layers in a format that only ComfyUI's own loader reads: {kinds}"] if foreign else []


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
