"""Cross-attention of video tokens over those of a text: dense, with the query's norm and the output's int8 in it.

A Triton kernel (kernels/cross_attention.py) computes where it can, its torch twin elsewhere. The models still take
torch's attention for this: which is faster has not been measured on a card.
"""

import torch
import torch.nn.functional as F

from .errors import TurboError
from .int8 import block_scale_shape, quantize_block
from .paths import use_triton
from .sla import DTYPES, HEAD_DIMS
from .sla_torch import normed


def cross_attention(q, k, v, sums=None, norm_weight=None, eps: float = 1e-6, quantize: bool = False):
    """Softmax attention over all keys; RMSNorm of q over its full width first, where norm_weight is given.

    q: float [B, L, H, D]; k, v: [B, keys, H, D] in q's dtype, k after its own norm. norm_weight: float [H * D]; sums:
    float32 [P, B * L], partial sums of squares of each token of q, None reads q for them.
    Returns [B, L, H, D] in q's dtype; with quantize (int8 [B * L, H * D], float32 scale [ceil(B * L / 128),
    ceil(H * D / 128)]), the block format of turbo_core.int8. Raises TurboError.
    """
    if q.ndim != 4 or k.shape != v.shape or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        got = ", ".join(str(list(t.shape)) for t in (q, k, v))
        raise TurboError(
            f"cross_attention: q must be [B, L, H, D], k and v [B, keys, H, D] with its B, H, D; got {got}"
        )
    if 0 in q.shape or 0 in k.shape:
        raise TurboError(f"cross_attention: there must be queries and keys, got {list(q.shape)}, {list(k.shape)}")
    if not q.is_floating_point() or {t.dtype for t in (k, v)} != {q.dtype} or {t.device for t in (k, v)} != {q.device}:
        got = ", ".join(f"{t.dtype} on {t.device}" for t in (q, k, v))
        raise TurboError(f"cross_attention: q, k, v must be of one float dtype on one device, got {got}")
    b, length, h, d = q.shape
    if norm_weight is None and sums is not None:
        raise TurboError("cross_attention: sums are those of a norm, which needs norm_weight")
    for name, t, shape in (("norm_weight", norm_weight, [h * d]), ("sums", sums, ["P", b * length])):
        if t is not None and (t.ndim != len(shape) or t.shape[-1] != shape[-1] or 0 in t.shape or t.device != q.device):
            raise TurboError(
                f"cross_attention: {name} must be {shape} on {q.device}, got {list(t.shape)} on {t.device}"
            )
    if torch.compiler.is_compiling():
        op = torch.ops.turbowan.cross_attention_quantized if quantize else torch.ops.turbowan.cross_attention
    else:
        op = _quantized if quantize else _plain
    return op(q, k, v, sums, norm_weight, eps)


def _by_kernel(*tensors):
    q = tensors[0]
    # float32 does not fit the registers of a card: torch's own kernel is for it
    dtypes = (torch.float16, torch.bfloat16) if q.device.type == "cuda" else DTYPES
    learning = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return not learning and q.shape[-1] in HEAD_DIMS and q.dtype in dtypes and use_triton(q.device, "sla")


def _attend(q, k, v, sums, norm_weight, eps, quantize):
    if _by_kernel(q, k, v, norm_weight):
        from .kernels.cross_attention import cross_attention
        from .kernels.sla_attention import can_quantize

        q = q if q.stride(3) == 1 and q.stride(2) == q.shape[3] else q.contiguous()
        k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
        sums, norm_weight = (None if x is None else x.float().contiguous() for x in (sums, norm_weight))
        quantize = quantize and can_quantize(q)
        return cross_attention(q, k, v, sums, norm_weight, eps, quantize)
    q = normed(q, sums, norm_weight, eps, None, None)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _plain(q, k, v, sums, norm_weight, eps):
    return _attend(q, k, v, sums, norm_weight, eps, False).contiguous()


def _quantized(q, k, v, sums, norm_weight, eps):
    o = _attend(q, k, v, sums, norm_weight, eps, True)
    return o if isinstance(o, tuple) else quantize_block(o.flatten(2).flatten(0, 1))


def _fake_quantized(q, *_):
    rows, columns = q.shape[0] * q.shape[1], q.shape[2] * q.shape[3]
    scale = q.new_empty(block_scale_shape(rows, columns), dtype=torch.float32)
    return q.new_empty(rows, columns, dtype=torch.int8), scale


_ARGUMENTS = "(Tensor q, Tensor k, Tensor v, Tensor? sums, Tensor? norm_weight, float eps)"
torch.library.custom_op(
    "turbowan::cross_attention", _plain, mutates_args=(), schema=f"{_ARGUMENTS} -> Tensor"
).register_fake(lambda q, *_: q.new_empty(q.shape))
torch.library.custom_op(
    "turbowan::cross_attention_quantized", _quantized, mutates_args=(), schema=f"{_ARGUMENTS} -> (Tensor, Tensor)"
).register_fake(_fake_quantized)
