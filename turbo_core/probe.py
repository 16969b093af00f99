"""A small trial of each kernel family against its torch twins, on the device it is to run on, before its first result.

Sizes are ragged where kernels mask, and on a card also those that the launch parameters of real videos are for. The
twin computes on the CPU: there its integer products are exact and nothing depends on what the card's libraries round.
Rounding is allowed, a wrong block, row or value is not.
"""

import torch

from . import int8_mm as mm
from . import norms
from .int8 import dequantize_block, quantize_block, quantize_rows
from .paths import without_kernels
from .sla import sla_from_qkv, sparse_linear_attention

HALVES = (torch.bfloat16, torch.float16)
# norm of the difference to that of the twin's result
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-4}
SPARSE = {"bf16": 2e-2, "int8": 6e-2}  # scores and probabilities are rounded at other places
CHANGED = 0.01  # share of int8 values that may be the neighbour of the twin's


def _difference(ours, theirs, tolerance):
    """What is wrong with a result, in a few words, or None."""
    if isinstance(theirs, (tuple, list)):
        return next(filter(None, (_difference(a, b, tolerance) for a, b in zip(ours, theirs, strict=True))), None)
    if theirs is None:
        return None if ours is None else "a result too many"
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{ours.dtype} {list(ours.shape)} in place of {theirs.dtype} {list(theirs.shape)}"
    away = ours.double() - theirs.double()
    if theirs.dtype == torch.int8:
        worst, share = away.abs().max().item(), (away != 0).double().mean().item()
        return f"{share:.1%} of the int8 values differ, by up to {worst:.0f}" if worst > 1 or share > CHANGED else None
    tolerance = tolerance or TOLERANCE[theirs.dtype]
    error = (away.norm() / theirs.double().norm()).item()
    # one bad row or block must not hide behind many good ones; comparisons with NaN are false
    worst = (away.abs().max() / theirs.double().abs().max()).item()
    good = error <= tolerance and worst <= 10 * tolerance
    return None if good else f"relative error {error:.1e}, {worst:.1e} at worst"


def _moved(operands, device):
    """The same operands with every tensor on the device; tuples and lists of them too."""
    if isinstance(operands, torch.Tensor):
        return operands.to(device)
    if isinstance(operands, (tuple, list)):
        return type(operands)(_moved(x, device) for x in operands)
    return operands


def _first_difference(device, cases):
    """cases: (function, operands, named operands, tolerance or None for that of the dtype), operands on the CPU."""
    for function, operands, named, tolerance in cases:
        named_there = {name: _moved(x, device) for name, x in named.items()}
        ours = _moved(function(*_moved(operands, device), **named_there), "cpu")
        with without_kernels():
            theirs = function(*operands, **named)
        reason = _difference(ours, theirs, tolerance)
        if reason:
            return f"{function.__name__} is not what PyTorch computes: {reason}"
    return None


def _draw(*shape, dtype=torch.float32, seed=0):
    """Normal values; a matrix has a row of zeros, a row of large ones and a row with a far mean."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if x.ndim == 2 and len(x) > 4:
        x[1], x[2], x[3] = 0, 30 * x[2], x[3] + 5
    return x.to(dtype)


def _widths(device):
    """Rows and columns of activations: ragged, and on a card the widths of the published models."""
    ragged = [(134, 200)]  # two groups of 67 rows
    return ragged if device.type == "cpu" else [*ragged, (300, 1536), (300, 5120)]


def quantize(device):
    """quantize_block and quantize_rows."""
    sizes = [(dtype, *size) for dtype in HALVES for size in _widths(device)]
    drawn = [_draw(rows, columns, dtype=dtype) for dtype, rows, columns in sizes]
    return _first_difference(device, [(f, (x,), {}, None) for x in drawn for f in (quantize_block, quantize_rows)])


def norm(device):
    """row_stats, rms_norm, layer_norm_quantize in both formats and forms."""
    cases = []
    for dtype, rows, columns in [(dtype, *size) for dtype in HALVES for size in _widths(device)]:
        x = _draw(rows, columns, dtype=dtype)
        weight, bias = 1 + 0.1 * _draw(2, columns, seed=1)
        shift, scale = 0.5 * _draw(2, 2, columns, seed=2)
        with without_kernels():
            stats = norms.row_stats(x)
        cases += [(norms.row_stats, (x,), {}, None), (norms.rms_norm, (x, weight, 1e-6), {}, None)]
        for given in (
            {"weight": weight, "bias": bias, "stats": stats},
            {"shift": shift, "scale": scale, "stats": stats},
            {"shift": shift, "scale": scale},
        ):
            for by_rows in (False, True):
                cases.append((norms.layer_norm_quantize, (x, 1e-6), given | {"rows": by_rows}, None))
    return _first_difference(device, cases)


def int8_mm(device):
    """Every form of the product, in both formats."""
    small, large = (134, 136, 200), (1402, 2176, 384)  # the large one has more tiles than any card has processors
    cases = []
    for m, n, k in [small] if device.type == "cpu" else [small, large]:
        for quantized in (quantize_block, quantize_rows):
            with without_kernels():
                x = quantized(_draw(m, k))
                weights = [quantized(_draw(n, k, seed=seed) / k**0.5) for seed in (1, 2, 3)]
            cases += _forms(x, weights, quantized is quantize_block)
    return _first_difference(device, cases)


def _forms(x, weights, block):
    m, n = len(x[0]), len(weights[0][0])
    biases = [_draw(1, n, dtype=torch.bfloat16, seed=seed)[0] for seed in (4, 5, 6)]
    residual, gate = _draw(m, n, dtype=torch.bfloat16, seed=7), _draw(2, n, seed=8)
    layer = (*x, *weights[0], biases[0])
    cases = [(mm.int8_mm, layer, {"out_dtype": dtype}, None) for dtype in HALVES]
    cases.append((mm.int8_mm, layer, {"gelu": True}, None))
    cases += [(mm.int8_mm_quantize, layer, {}, None)] if block else []
    cases.append((mm.int8_mm_residual, (*layer, residual, gate), {}, None))
    cases.append((mm.int8_mm_residual, (*layer, residual), {"stats": False}, None))
    cases.append((mm.int8_mm_qkv, (*x, *zip(*weights), biases), {}, None))
    return cases


def sla(device):
    """Block means, block map, preparation and attention in both precisions, with norms and rotation and without."""
    cases = []
    lengths = (150, 90) if device.type == "cpu" else (333, 200)  # ragged blocks of queries and of keys
    for dtype, head_dim, batch, length in zip(HALVES, (128, 64), (1, 2), lengths):
        qkv, raw, proj = _attention_inputs(dtype, head_dim, batch, length)
        for precision in ("bf16", "int8"):
            raw_form, tolerance = (qkv, *raw, *proj), SPARSE[precision]
            cases.append((sla_from_qkv, (*raw_form, 0.5, precision), {}, tolerance))
            if head_dim == 128:  # the forms that differ by more than the size of a head are tried once
                cases.append((sla_from_qkv, (*raw_form, 1.0, precision), {}, tolerance))
                cases.append((sla_to_int8, (*raw_form, 0.5, precision), {}, tolerance))
            else:
                plain = (*qkv, None, None, 0.5)
                for selection in ({}, {"coverage": 0.6}):
                    cases.append((sparse_linear_attention, plain, {"precision": precision} | selection, tolerance))
    return _first_difference(device, cases)


def sla_to_int8(*operands):
    return dequantize_block(*sla_from_qkv(*operands, quantize=True))


def _attention_inputs(dtype, head_dim, batch, length):
    """q, k, v whose key blocks score far apart, so that rounding cannot choose other ones; norms and turns; proj_l."""
    heads, half = 2, head_dim // 2
    qkv = _draw(3, batch, length, heads, head_dim)
    qkv[0] += 1.0
    qkv[1] += 0.4 * (torch.arange(length) // 64 * 5 % 7)[:, None, None]  # the best blocks are not the first
    qkv = qkv.to(dtype)
    sums = qkv[:2].float().square().sum((-1, -2)).view(2, 1, -1)
    weights = 1 + 0.1 * _draw(2, heads * head_dim, seed=1)
    angles = 0.3 * _draw(length, half, seed=2)  # small turns keep the order of the blocks
    proj = _draw(head_dim, head_dim, seed=3) / head_dim**0.5, _draw(1, head_dim, seed=4)[0]
    return qkv, (sums, *weights, 1e-6, angles.cos(), angles.sin()), proj


PROBES = {"quantize": quantize, "norm": norm, "int8_mm": int8_mm, "sla": sla}
