"""Sparse-linear attention by the Triton kernels: block means, block map, prepared keys and values, attention.

The names and arguments of reference.py. Importing this needs Triton: turbo_core.sla.paths does so where kernels
compute.
"""

import functools
import logging

import torch

from ..int8 import quantize_block
from ..kernels import block_map, sla_attention, sla_pool, sla_prepare
from . import reference
from .blocks import as_written, covering_blocks, kept_blocks, own_blocks, top_blocks

_DONE = (None, None, None, 1e-6, None, None)  # q and k as they are


def has_fp8(device) -> bool:
    """True where probabilities and values meet in fp8 e4m3: NVIDIA from compute capability 8.9 on; else in fp16."""
    if device.type != "cuda":
        return device.type == "cpu"  # the interpreter
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def sparse_linear_attention(q, k, v, proj_weight, proj_bias, topk, coverage, block_q, block_k, precision):
    """Both branches; arguments as of turbo_core.sla.sparse_linear_attention."""
    settings = proj_weight, proj_bias, topk, coverage
    plain = topk == 1.0 and coverage is None and precision == "bf16" and proj_weight is None  # torch has kernels
    if plain or (block_q, block_k) != (128, 64):
        return reference.sparse_linear_attention(q, k, v, *settings, block_q, block_k, precision)
    return _attend(q, k, v, _DONE, *settings, precision)


def sla_from_qkv(qkv, sums, norm_q, norm_k, eps, cos, sin, *settings):
    """The same of q, k, v as their projections left them; arguments as of turbo_core.sla.sla_from_qkv."""
    return _attend(*qkv, (sums, norm_q, norm_k, eps, cos, sin), *settings)


def sla_from_qkv_quantized(qkv, sums, norm_q, norm_k, eps, cos, sin, *settings):
    """The same as int8 in the block format: (int8 [B * L, H * D], float32 scale)."""
    return _attend(*qkv, (sums, norm_q, norm_k, eps, cos, sin), *settings, quantize=True)


def _attend(q, k, v, raw, proj_weight, proj_bias, topk, coverage, precision, quantize=False):
    """q, k, v: [B, L, H, D] views; raw: (sums, norm_q, norm_k, eps, cos, sin), what is still to be done to q and k."""
    with as_written(q.device):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        low_bit, linear = precision == "int8", proj_weight is not None
        sums, norm_q, norm_k, eps, cos, sin = _as_float(q, k, *raw)
        index = counts = k_mean = v_amax = None
        dense = coverage is None and topk == 1.0
        if low_bit or not dense:
            means = sla_pool.pool_means(q, k, v if low_bit else None, sums, norm_q, norm_k, eps, cos, sin)
            pooled_q, pooled_k, k_mean, v_amax = means
            if coverage is not None:
                index, counts = covering_blocks(pooled_q, pooled_k, coverage, own_blocks(q, k))
            elif not dense:
                index = _top_blocks(pooled_q, pooled_k, kept_blocks(topk, pooled_k.shape[2]), k_mean)
            del means, pooled_q, pooled_k
        raw_k = sums, norm_k, eps, cos, sin
        prepared = sla_prepare.prepare(k, v, k_mean, v_amax, low_bit, has_fp8(q.device), linear, *raw_k)
        keys, k_scale, values, v_scale, kv, k_sum = prepared
        kv_proj = bias = None
        if linear:
            # in TF32, where somebody has turned that on, it is still finer than the kernel, which takes it in 16 bits
            kv_proj, bias = kv @ proj_weight.float().t(), proj_bias.float().contiguous()
        # float32 values go in tiles of 64 queries, which are no scale blocks
        by_kernel = quantize and sla_attention.can_quantize(q, low_bit)
        o = sla_attention.attention(
            q, keys, values, index, k_scale, v_scale, kv_proj, k_sum, bias,
            sums=sums, q_weight=norm_q, eps=eps, cos=cos, sin=sin, counts=counts, quantize=by_kernel,
        )  # fmt: skip
        return quantize_block(o.view(-1, o.shape[2] * o.shape[3])) if quantize and not by_kernel else o


def _top_blocks(pooled_q, pooled_k, kept, k_mean):
    """blocks.top_blocks: by the kernel up to its longest row, else in torch, one head at a time for memory."""
    blocks = pooled_k.shape[2]
    if blocks <= block_map.MOST_BLOCKS:
        return block_map.block_map(pooled_q, pooled_k, kept, k_mean)
    _tell_of_long_rows(blocks)
    heads = zip(pooled_q.split(1, 1), pooled_k.split(1, 1))
    return torch.cat([top_blocks(q, k, kept) for q, k in heads], 1)


@functools.cache
def _tell_of_long_rows(blocks):
    logging.info("TurboWan: PyTorch chooses among %d key blocks, too many for the kernel: slower.", blocks)


def _as_float(q, k, sums, norm_q, norm_k, eps, cos, sin):
    """The raw form as the kernels take it: contiguous float32, one sum for each token."""
    if norm_q is None:
        sums = None
    elif sums is None:
        sums = torch.stack([torch.linalg.vector_norm(x, dim=(2, 3), dtype=torch.float32).square() for x in (q, k)])
        sums = sums.view(2, 1, -1)
    else:
        sums = sums.sum(1, keepdim=True)
    tensors = (None if x is None else x.float().contiguous() for x in (sums, norm_q, norm_k, cos, sin))
    sums, norm_q, norm_k, cos, sin = tensors
    return sums, norm_q, norm_k, eps, cos, sin
