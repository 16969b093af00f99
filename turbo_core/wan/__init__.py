"""A plain Wan 2.1 / 2.2 diffusion transformer with the official parameter names.

Dense or sparse-linear self-attention, float or int8 linears.
"""

from .block import QUANTIZED_LINEARS, Attention, Block
from .layers import Int8Linear, RMSNorm, apply_rope, token_slices
from .model import PATCH, WanModel, timestep_embedding
from .text import Text

__all__ = [
    "PATCH", "QUANTIZED_LINEARS", "Attention", "Block", "Int8Linear", "RMSNorm", "Text", "WanModel", "apply_rope",
    "timestep_embedding", "token_slices",
]  # fmt: skip
