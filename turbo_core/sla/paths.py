"""Who computes sparse-linear attention: the one place where the kernels or their torch reference are chosen.

torch.compile gets one node instead of the loops unrolled; when the graph runs, the node asks again who computes.
"""

import torch

from ..dispatch import OPERATORS, learning, register_operator, use_triton
from ..int8 import block_scale_shape
from . import reference


def operations(q, *operands):
    """Where the functions that compute attention of q are found, under the names of reference.py.

    That is fast, where the kernels compute on q's device, else reference; while torch.compile traces it is
    torch's operators. operands: tensors or None; where one of them learns it is reference, kernels have no gradient.
    """
    if learning(q, *operands):
        return reference
    return getattr(torch.ops, OPERATORS) if torch.compiler.is_compiling() else _eager(q)


def _eager(q):
    # tiles of float32 do not fit the registers of any card: the kernels would wait for the memory they spill to. The
    # interpreter keeps them, to show what the kernels do differently from the reference without the inputs' rounding.
    slow = q.dtype == torch.float32 and q.device.type == "cuda"
    if not slow and use_triton(q.device, "sla"):
        from . import fast

        return fast
    return reference


def _operator(name, arguments, results, empty):
    """OPERATORS::name. empty: the same arguments -> results of the right shapes and dtypes."""

    def run(*given):
        return getattr(_eager(given[0]), name)(*given)

    register_operator(name, run, f"({arguments}) -> {results}", empty, reads_back=True)  # selection by score does


def _empty_int8(qkv, *_):
    rows, cols = qkv.shape[1] * qkv.shape[2], qkv.shape[3] * qkv.shape[4]
    scale = qkv.new_empty(block_scale_shape(rows, cols), dtype=torch.float32)
    return qkv.new_empty(rows, cols, dtype=torch.int8), scale


_PROJ = "Tensor? proj_weight, Tensor? proj_bias, float topk, float? coverage"
_QKV = (
    "Tensor qkv, Tensor? sums, Tensor? norm_q, Tensor? norm_k, float eps, Tensor? cos, Tensor? sin, "
    f"{_PROJ}, str precision"
)
_operator(
    "sparse_linear_attention",
    f"Tensor q, Tensor k, Tensor v, {_PROJ}, int block_q, int block_k, str precision",
    "Tensor",
    lambda q, *_: q.new_empty(q.shape),
)
_operator("sla_from_qkv", _QKV, "Tensor", lambda qkv, *_: qkv.new_empty(qkv.shape[1:]))
_operator("sla_from_qkv_quantized", _QKV, "(Tensor, Tensor)", _empty_int8)
