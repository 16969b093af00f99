"""The int8 operations by the Triton kernels, under the names and with the arguments of reference.py.

Operands are contiguous, but x of the norms and of quantization, which may have any strides. Importing this needs
Triton: turbo_core.int8.paths does so where kernels compute.
"""

from ..kernels.int8_mm import int8_mm, int8_mm_qkv, int8_mm_quantize, int8_mm_residual
from ..kernels.norm import layer_norm_quantize, rms_norm
from ..kernels.quantize import quantize_block, quantize_rows
from ..kernels.row_stats import row_stats
from .formats import is_row_scale

__all__ = [
    "int8_linear", "int8_mm", "int8_mm_qkv", "int8_mm_quantize", "int8_mm_residual", "layer_norm_quantize",
    "quantize_block", "quantize_rows", "rms_norm", "row_stats",
]  # fmt: skip


def int8_linear(x, weight_q, weight_scale, bias=None):
    """Float [M, K] -> [M, N] in x's dtype, x quantized in the weight's format."""
    quantize = quantize_rows if is_row_scale(weight_q, weight_scale) else quantize_block
    bias = None if bias is None else bias.contiguous()
    return int8_mm(*quantize(x), weight_q.contiguous(), weight_scale.contiguous(), bias, x.dtype)
