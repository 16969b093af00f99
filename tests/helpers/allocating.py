"""Operations of a fused block that compute nothing and allocate what kernels allocate: their results."""

from types import SimpleNamespace

import torch

from turbo_core.int8 import block_scale_shape


def norm(x, eps, weight=None, bias=None, shift=None, scale=None, stats=None, rows=False):
    x.new_empty(*x.shape, dtype=torch.int8)
    if stats is None:
        x.new_empty(-(-x.shape[1] // 128), x.shape[0], 2, dtype=torch.float32)
    return quantized(x, rows)


def quantized(x, rows=False):
    m, k = x.shape
    shape = (m, 1) if rows else block_scale_shape(m, k)
    return x.new_empty(m, k, dtype=torch.int8), x.new_empty(shape, dtype=torch.float32)


def product(x, x_scale, w, w_scale, bias=None, out_dtype=torch.bfloat16, gelu=False):
    return x.new_empty(x.shape[0], w.shape[0], dtype=out_dtype)


def product_quantized(x, x_scale, w, w_scale, bias=None, gelu=True):
    return quantized(x.new_empty(1, dtype=torch.float32).expand(x.shape[0], w.shape[0]))


def residual(x, x_scale, w, w_scale, bias, before, gate=None, stats=True):
    m, n = before.shape
    return torch.empty_like(before), x.new_empty(-(-n // 128), m, 2, dtype=torch.float32) if stats else None


def qkv(x, x_scale, weights, scales, biases, out_dtype):
    m, n = x.shape[0], weights[0].shape[0]
    return x.new_empty(3, m, n, dtype=out_dtype), x.new_empty(2, -(-n // 128), m, dtype=torch.float32)


def attention(qkv, sums, *rest):
    _, batch, length, heads, head_dim = qkv.shape
    precision, quantize = rest[-2:]
    low = precision == "int8"
    held = [torch.empty_like(qkv[1], dtype=torch.int8 if low else None)]  # k
    held += [torch.empty_like(qkv[2], dtype=torch.float16)] if low else []  # v, where the card has no fp8
    if quantize:  # int8 straight away
        return quantized(qkv[0].view(-1, heads * head_dim))
    return qkv.new_empty(batch, length, heads, head_dim)


OPERATIONS = SimpleNamespace(
    layer_norm_quantize=norm,
    int8_mm=product,
    int8_mm_quantize=product_quantized,
    int8_mm_residual=residual,
    int8_mm_qkv=qkv,
    quantize_block=quantized,
    quantize_rows=lambda x, out=None: out or quantized(x, True),
    rms_norm=lambda x, weight, eps: torch.empty_like(x),
)
