"""W8A8 linears: 128x128-block and row-wise int8 quantization and the matrix product on it.

Weights are [N, K], activations [..., K]. Two formats, told apart by the shape of the scale:
block, scale [ceil(M/128), ceil(K/128)] (the published *-quant.pth); row, scale [M, 1] (ComfyUI's int8_tensorwise).
"""

from .formats import (
    BLOCK,
    block_scale_shape,
    check_scale,
    dequantize,
    dequantize_block,
    dequantize_rows,
    is_row_scale,
)
from .linear import int8_linear
from .paths import operations
from .quantize import quantize_block, quantize_rows

__all__ = [
    "BLOCK", "block_scale_shape", "check_scale", "dequantize", "dequantize_block", "dequantize_rows", "int8_linear",
    "is_row_scale", "operations", "quantize_block", "quantize_rows",
]  # fmt: skip
