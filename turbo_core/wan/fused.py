"""One Wan block over the int8 operations: every pass over the tokens but attention's own belongs to a matrix product.

The maths of Block.forward up to rounding: activations go from float32 straight to int8, where the block
that is made of layers rounds them to their dtype in between. Plain functions: whoever holds the weights, turbo_core.wan
or the nodes, lends them layer by layer and brings the two attentions along.
"""

import torch

from ..dispatch import explained, use_triton
from ..int8 import BLOCK, is_row_scale, operations
from ..int8.paths import FAMILIES

_LEFT = "_turbowan_row_stats"  # on a block's result: (writes to it so far, its row statistics)


def pays(device) -> bool:
    """True where kernels compute these operations; elsewhere the layers one by one are as good, and the reference."""
    return all(use_triton(device, family) for family in FAMILIES)


def block(x, context, modulation, borrow, attend, attend_text, norm3, num_heads: int, eps: float, leave=True):
    """One block. x [B, L, dim] in a float dtype -> [B, L, dim]; context [B, keys, dim].

    modulation: shift, scale, gate before attention and shift, scale, gate before the feed-forward part, each
    float32 [G, dim], one row for each B * L / G consecutive tokens.
    borrow(*names): a context manager that lends [(int8 weight [N, K], scale, bias), ...] of linears by their names in
    the block, all ten in one format, for as long as it is open.
    attend(qkv [3, B, L, dim], sums, quantized): self-attention, q and k as they leave their linears, with the sums of
    squares that int8_mm_qkv gives; returns [B, L, dim], or where quantized is True it may return that as int8 [B * L,
    dim] with block scales. attend_text(q, project): cross-attention, q [B, L, dim] before its norm; project() computes
    keys and values [B, keys, dim] before their norm, for who has not kept them; returns [B, L, dim].
    norm3: (weight, bias) of the norm before cross-attention.
    In the block format the last product leaves the result's row statistics with it: the next block, given this very
    tensor, does not read it for them. Whoever makes another tensor of it, or writes to it, makes that block read it.
    leave: False where nothing but the result may outlive the block.
    Who computes is asked once; whoever lends weights has checked them, and the kernels refuse shapes and strides that
    do not fit. Raises TurboError where a kernel cannot start.
    """
    with explained():
        run = operations(x.device)
        out, stats = _block(run, x, context, modulation, borrow, attend, attend_text, norm3, num_heads, eps)
    return _leave(out, stats) if leave else out


def _block(run, x, context, modulation, borrow, attend, attend_text, norm3, num_heads, eps):
    shape, dtype = x.shape, x.dtype
    batch, length, dim = shape
    shift1, scale1, gate1, shift2, scale2, gate2 = (part.contiguous() for part in modulation)
    left = _left_with(x)
    x = x.contiguous().view(-1, dim)
    with borrow("self_attn.q", "self_attn.k", "self_attn.v") as layers:
        rows = is_row_scale(*layers[0][:2])
        stats = None if rows else left
        y = run.layer_norm_quantize(x, eps, shift=shift1, scale=scale1, stats=stats, rows=rows)
        weights, scales, biases = map(list, zip(*layers))
        assert len({bias is None for bias in biases}) == 1, "biases of q, k and v: all or none"
        qkv, sums = run.int8_mm_qkv(*y, weights, scales, None if biases[0] is None else biases, out_dtype=dtype)
    del y
    # one head of 128 queries is one block of the next product's scales, unless a block spans two samples
    quantized = not rows and dim == num_heads * BLOCK and (batch == 1 or length % BLOCK == 0)
    y = attend(qkv.view(3, *shape), sums, quantized)
    del qkv, sums
    y = _quantize(run, y, rows)
    with borrow("self_attn.o") as (o,):
        x, stats = _residual(run, y, o, x, gate1, rows)
    y = run.layer_norm_quantize(x, eps, *norm3, stats=stats, rows=rows)
    with borrow("cross_attn.q") as (q,):
        y = run.int8_mm(*y, *q, out_dtype=dtype)

    def project():
        text = _quantize(run, context, rows)
        with borrow("cross_attn.k", "cross_attn.v") as layers:
            return [run.int8_mm(*text, *layer, out_dtype=dtype).view(context.shape) for layer in layers]

    y = _quantize(run, attend_text(y.view(shape), project), rows)
    with borrow("cross_attn.o") as (o,):
        x, stats = _residual(run, y, o, x, None, rows)
    y = run.layer_norm_quantize(x, eps, shift=shift2, scale=scale2, stats=stats, rows=rows)
    with borrow("ffn.0") as (up,):
        y = _inner(run, *y, up, rows, dtype)
    with borrow("ffn.2") as (down,):
        x, stats = _residual(run, y, down, x, gate2, rows)
    return x.view(shape), stats


def _residual(run, y, layer, x, gate, rows: bool):
    """(x + gate * layer(y), its row statistics, or None in the row format, whose norms have whole rows at hand)."""
    x, stats = run.int8_mm_residual(*y, *layer, x, gate, stats=not rows)
    return x, None if rows else stats


def _leave(x, stats):
    """x with its row statistics."""
    if stats is not None and not torch.compiler.is_compiling() and not x.is_inference():
        setattr(x, _LEFT, (x._version, stats))
    return x


def _left_with(x):
    """What the block before has left with x; None where x is another tensor, or was written to since."""
    if torch.compiler.is_compiling():
        return None  # a graph keeps values, not what hangs on tensors
    writes, stats = getattr(x, _LEFT, (None, None))
    return stats if writes is not None and writes == x._version else None


def _quantize(run, x, rows: bool):
    """x [..., K] as int8 [M, K] with its scales, in the row or the block format; a pair of these stays as it is."""
    if isinstance(x, tuple):
        return x
    return (run.quantize_rows if rows else run.quantize_block)(x.reshape(-1, x.shape[-1]))


def _inner(run, x_q, x_scale, up, rows, dtype):
    """The feed-forward part up to its second product: int8 [M, ffn_dim] and its scales."""
    if not rows:
        return run.int8_mm_quantize(x_q, x_scale, *up, gelu=True)
    m, n = len(x_q), len(up[0])
    # as floats at most as large as the tokens: rows are independent
    step = max(1, m * x_q.shape[1] // n // BLOCK) * BLOCK
    y, scale = x_q.new_empty(m, n), x_scale.new_empty(m, 1)
    for start in range(0, m, step):
        part = slice(start, start + step)
        inner = run.int8_mm(x_q[part], x_scale[part], *up, out_dtype=dtype, gelu=True)
        if torch.compiler.is_compiling():  # an operator makes its results itself
            y[part], scale[part] = run.quantize_rows(inner)
        else:
            run.quantize_rows(inner, (y[part], scale[part]))
        del inner  # gone before the next slice is made
    return y, scale
