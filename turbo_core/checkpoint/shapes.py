"""The names and shapes that a Wan model must have."""

from typing import NamedTuple

from ..wan import QUANTIZED_LINEARS
from .names import PROJ_L


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
