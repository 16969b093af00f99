"""Torch twins of TurboDiffusion's CUDA extension: the published int8 arithmetic, for machines without the card.

Written from ops/quant/quant.hpp and ops/gemm/kernel.hpp of thu-ml/TurboDiffusion, and independent of turbo_core.int8:
here a block is visited at a time and scaled by the rounded 128 / amax, as the kernel does.
"""

import torch

BLOCK = 128
FLOOR = 1e-8


def quant_cuda(x, out=None, out_scale=None):
    """float [M, K] -> (int8 [M, K], float32 scale [ceil(M/128), ceil(K/128)]), in the kernel's float32 steps."""
    q = torch.empty(x.shape, dtype=torch.int8)
    scale = torch.empty(-(-x.shape[0] // BLOCK), -(-x.shape[1] // BLOCK))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            block = x[at].float()
            amax = block.abs().max().clamp(min=FLOOR)
            q[at] = (block * (128.0 / amax)).round().clamp(-128, 127).to(torch.int8)
            scale[i, j] = amax / 128.0
    return q, scale


def gemm_cuda(a, a_scale, b, b_scale, out):
    """out [M, N] = dequantized a [M, K] @ dequantized b [N, K]^T: exact int32 per 128 of K, summed in float32."""
    assert a.shape[1] % BLOCK == 0, "the CUDA kernel takes K in multiples of 128"
    rows = torch.arange(a.shape[0]) // BLOCK
    columns = torch.arange(b.shape[0]) // BLOCK
    total = torch.zeros(out.shape)
    for j in range(a_scale.shape[1]):
        k = slice(j * BLOCK, (j + 1) * BLOCK)
        dot = a[:, k].double() @ b[:, k].double().t()
        scale = a_scale[rows, j][:, None] * b_scale[columns, j][None, :]
        total = (total + dot * scale).float()  # a fused multiply-add: one rounding, from float64
    out.copy_(total)
