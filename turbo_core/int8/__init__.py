"""W8A8 linears: 128x128-block and row-wise int8 quantization and the matrix product on it.

Weights are [N, K], activations [..., K]. Two formats, told apart by the shape of the scale:
block, scale [ceil(M/128), ceil(K/128)] (the published *-quant.pth); row, scale [M, 1] (ComfyUI's int8_tensorwise).
"""

from .matmul import int8_linear, int8_mm, int8_mm_qkv, int8_mm_quantize, int8_mm_residual
from .norm import layer_norm_quantize, rms_norm, row_stats
from .quantize import (
    BLOCK,
    block_scale_shape,
    check_scale,
    dequantize,
    dequantize_block,
    dequantize_rows,
    is_row_scale,
    quantize_block,
    quantize_rows,
)

__all__ = [
    "BLOCK", "block_scale_shape", "check_scale", "dequantize", "dequantize_block", "dequantize_rows", "int8_linear",
    "int8_mm", "int8_mm_qkv", "int8_mm_quantize", "int8_mm_residual", "is_row_scale", "layer_norm_quantize",
    "quantize_block", "quantize_rows", "rms_norm", "row_stats",
]  # fmt: skip
