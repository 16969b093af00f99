"""LayerNorm with modulation to int8, row statistics and RMSNorm.

Triton kernels (kernels/norm.py) compute where they can, their torch twins (norm_twins) elsewhere.

x is [M, K], batch and tokens flattened. Row statistics are partial: mean and sum of squared deviations (M2) of each
span of 128 columns, as the epilogue of a matrix product leaves them; the reader merges them.
Every function raises TurboError, before any launch, where type, shape or device of an operand does not fit.
"""

import torch

from ..dispatch import FLOATS, explained, learning, use_triton
from ..errors import check_float, refuse
from . import reference
from .quantize import BLOCK, block_scale_shape


def _check_matrix(name, x):
    if x.ndim != 2 or x.dtype not in FLOATS:
        refuse(name, "x", "a float16, bfloat16 or float32 matrix [M, K]", f"{x.dtype} {list(x.shape)}")


def row_stats(x):
    """Partial row statistics for layer_norm_quantize.

    x: float16, bfloat16 or float32 [M, K], any strides. Returns float32 [ceil(K/128), M, 2]: mean and sum of squared
    deviations over each span of 128 columns, the last one over the columns that are there.
    """
    _check_matrix("row_stats", x)
    return (torch.ops.turbowan.row_stats if torch.compiler.is_compiling() else _row_stats)(x)


def layer_norm_quantize(x, eps, weight=None, bias=None, shift=None, scale=None, stats=None, rows=False):
    """(LayerNorm(x) * weight + bias) * (1 + scale) + shift, all in float32, quantized to int8.

    x: float16, bfloat16 or float32 [M, K], any strides. weight, bias: float [K] or None. shift, scale: float [G, K] or
    None, one row for each M/G consecutive rows of x. stats: row statistics of x, see row_stats; None reads x for them,
    and the row format, which has whole rows at hand, does not need them.
    Returns (int8 [M, K], float32 scale): the block format, [ceil(M/128), ceil(K/128)], or with rows the row format,
    [M, 1], see turbo_core.int8.
    """
    name = "layer_norm_quantize"
    _check_matrix(name, x)
    m, k = x.shape
    for what, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check_float(name, what, t, (k,), x.device)
    modulation = [(what, t) for what, t in (("shift", shift), ("scale", scale)) if t is not None]
    for what, t in modulation:
        groups = len(modulation[0][1]) if modulation[0][1].ndim else 1
        check_float(name, what, t, (groups, k), x.device)
        if groups == 0 or m % groups:
            refuse(name, "the number of rows of x", f"a multiple of the {groups} rows of {what}", m)
    if stats is not None:
        check_float(name, "stats", stats, (-(-k // BLOCK), m, 2), x.device)
        if stats.dtype != torch.float32:
            refuse(name, "stats", "float32", stats.dtype)
    run = torch.ops.turbowan.layer_norm_quantize if torch.compiler.is_compiling() else _layer_norm_quantize
    return run(x, eps, weight, bias, shift, scale, None if rows else stats, rows)


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight of each row, computed in float32.

    x: float16, bfloat16 or float32 [M, K], any strides. weight: float [K]. Returns [M, K] in x's dtype.
    """
    _check_matrix("rms_norm", x)
    check_float("rms_norm", "weight", weight, x.shape[1:], x.device)
    return (torch.ops.turbowan.rms_norm if torch.compiler.is_compiling() else _rms_norm)(x, weight, eps)


def _by_kernels(x, *tensors):
    return not learning(x, *tensors) and use_triton(x.device, "norm")


@explained
def _row_stats(x):
    if _by_kernels(x):
        from ..kernels.row_stats import row_stats as run
    else:
        run = reference.row_stats
    return run(x)


@explained
def _layer_norm_quantize(x, eps, weight, bias, shift, scale, stats, rows):
    if _by_kernels(x, weight, bias, shift, scale, stats):
        from ..kernels.norm import layer_norm_quantize as run

        weight, bias, shift, scale, stats = (
            None if t is None else t.contiguous() for t in (weight, bias, shift, scale, stats)
        )
    else:
        run = reference.layer_norm_quantize
    return run(x, eps, weight, bias, shift, scale, stats, rows)


@explained
def _rms_norm(x, weight, eps):
    if _by_kernels(x, weight):
        from ..kernels.norm import rms_norm as run
    else:
        run = reference.rms_norm
    return run(x, weight.contiguous(), eps)


def _empty_quantized(x, eps, weight, bias, shift, scale, stats, rows):
    m, k = x.shape
    q_scale = x.new_empty((m, 1) if rows else block_scale_shape(m, k), dtype=torch.float32)
    return x.new_empty(m, k, dtype=torch.int8), q_scale


def _register(name, function, schema, fake):
    torch.library.custom_op(f"turbowan::{name}", function, mutates_args=(), schema=schema).register_fake(fake)


# torch.compile gets one node for each
_register(
    "row_stats",
    _row_stats,
    "(Tensor x) -> Tensor",
    lambda x: x.new_empty(-(-x.shape[1] // BLOCK), x.shape[0], 2, dtype=torch.float32),
)
_register(
    "layer_norm_quantize",
    _layer_norm_quantize,
    "(Tensor x, float eps, Tensor? weight, Tensor? bias, Tensor? shift, Tensor? scale, Tensor? stats, bool rows)"
    " -> (Tensor, Tensor)",
    _empty_quantized,
)
_register(
    "rms_norm",
    _rms_norm,
    "(Tensor x, Tensor weight, float eps) -> Tensor",
    lambda x, weight, eps: x.new_empty(x.shape),
)
