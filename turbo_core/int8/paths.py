"""Who computes the int8 operations: the one place where a kernel or its torch reference is chosen.

torch.compile gets one node for each operation instead of thousands of slices and column blocks unrolled; when the graph
runs, a node asks again who computes on its device. These nodes are what a compiled int8 linear or Wan block meets.
"""

import torch

from ..dispatch import OPERATORS, learning, register_operator, use_triton
from . import kitchen, reference
from .formats import BLOCK, block_scale_shape, is_row_scale

FAMILIES = ("quantize", "norm", "int8_mm")


def operations(device, families=FAMILIES, *operands, rows=False):
    """Where the int8 operations that compute on this device are found, under the names of reference.py.

    That is fast, where the kernels of these families compute, else reference, or for an int8_linear on rows kitchen;
    while torch.compile traces it is torch's operators. operands: tensors or None; where one of them learns it is
    reference, kernels have no gradient.
    """
    if learning(*operands):
        return reference
    return getattr(torch.ops, OPERATORS) if torch.compiler.is_compiling() else _eager(device, families, rows)


def _eager(device, families, rows=False):
    if all(use_triton(device, family) for family in families):
        from . import fast

        return fast
    return kitchen if rows and kitchen.library(device) else reference


def _operator(name, families, arguments, results, empty):
    """OPERATORS::name. empty: the same arguments -> results of the right shapes and dtypes."""

    def run(*given):
        rows = name == "int8_linear" and len(given[0]) > 0 and is_row_scale(*given[1:3])
        out = getattr(_eager(given[0].device, families, rows), name)(*given)
        # an operator returns tensors only: the statistics that were not asked for are empty
        return tuple(given[0].new_empty(0) if t is None else t for t in out) if isinstance(out, tuple) else out

    register_operator(name, run, f"({arguments}) -> {results}", empty)


def _spans(n):
    return -(-n // BLOCK)


def _empty_int8(x, scale_shape):
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(scale_shape, dtype=torch.float32)


def _empty_normed(x, eps, weight=None, bias=None, shift=None, scale=None, stats=None, rows=False):
    return _empty_int8(x, (x.shape[0], 1) if rows else block_scale_shape(*x.shape))


def _empty_product(x, xs, w, ws, bias=None, out_dtype=torch.bfloat16, gelu=False):
    return xs.new_empty(x.shape[0], w.shape[0], dtype=out_dtype)


def _empty_quantized(x, xs, w, ws, bias=None, gelu=True):
    return x.new_empty(x.shape[0], w.shape[0]), xs.new_empty(block_scale_shape(x.shape[0], w.shape[0]))


def _empty_residual(x, xs, w, ws, bias, residual, gate=None, stats=True):
    sums = xs.new_empty(_spans(w.shape[0]), x.shape[0], 2) if stats else x.new_empty(0)
    return residual.new_empty(residual.shape), sums


def _empty_qkv(x, xs, weights, scales, biases=None, out_dtype=torch.bfloat16):
    rows, columns = x.shape[0], weights[0].shape[0]
    return xs.new_empty(3, rows, columns, dtype=out_dtype), xs.new_empty(2, _spans(columns), rows)


_LAYER = "Tensor x_q, Tensor x_scale, Tensor w_q, Tensor w_scale"
_AFFINE = "Tensor? weight=None, Tensor? bias=None, Tensor? shift=None, Tensor? scale=None, Tensor? stats=None"
_PAIR = "(Tensor, Tensor)"
for _name, _families, _arguments, _results, _empty in (
    (
        "int8_linear", ("quantize", "int8_mm"), "Tensor x, Tensor weight_q, Tensor weight_scale, Tensor? bias=None",
        "Tensor", lambda x, weight_q, weight_scale, bias=None: x.new_empty(x.shape[0], weight_q.shape[0]),
    ),
    ("quantize_block", ("quantize",), "Tensor x", _PAIR, lambda x: _empty_int8(x, block_scale_shape(*x.shape))),
    ("quantize_rows", ("quantize",), "Tensor x", _PAIR, lambda x: _empty_int8(x, (x.shape[0], 1))),
    ("rms_norm", ("norm",), "Tensor x, Tensor weight, float eps", "Tensor", lambda x, *_: x.new_empty(x.shape)),
    ("layer_norm_quantize", FAMILIES, f"Tensor x, float eps, {_AFFINE}, bool rows=False", _PAIR, _empty_normed),
    (
        "int8_mm", FAMILIES, f"{_LAYER}, Tensor? bias=None, ScalarType out_dtype=bfloat16, bool gelu=False",
        "Tensor", _empty_product,
    ),
    ("int8_mm_quantize", FAMILIES, f"{_LAYER}, Tensor? bias=None, bool gelu=True", _PAIR, _empty_quantized),
    (
        "int8_mm_residual", FAMILIES, f"{_LAYER}, Tensor? bias, Tensor residual, Tensor? gate=None, bool stats=True",
        _PAIR, _empty_residual,
    ),
    (
        "int8_mm_qkv", FAMILIES, "Tensor x_q, Tensor x_scale, Tensor[] weights, Tensor[] scales, Tensor[]? biases=None,"
        " ScalarType out_dtype=bfloat16", _PAIR, _empty_qkv,
    ),
):  # fmt: skip
    _operator(_name, _families, _arguments, _results, _empty)
