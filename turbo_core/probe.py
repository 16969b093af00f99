"""A small trial of each kernel family against its torch twins on the device it is to run on, before its first result.

Sizes are ragged where kernels mask, and on a card also large enough for the launch parameters of real videos. What is
compared is the same call twice, with kernels and without; rounding is allowed, a wrong block or row is not.
"""

import torch

from . import int8_mm as mm
from . import norms
from .int8 import quantize_block, quantize_rows
from .paths import without_kernels
from .sla import sla_from_qkv, sparse_linear_attention

HALVES = (torch.bfloat16, torch.float16)
# norm of the difference to that of the twin's result; int8 counts in steps
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


def _first_difference(cases):
    for name, run, tolerance in cases:
        ours = run()
        with without_kernels():
            theirs = run()
        reason = _difference(ours, theirs, tolerance)
        if reason:
            return f"{name} is not what PyTorch computes: {reason}"
    return None


def _draw(device, *shape, dtype=torch.float32, seed=0):
    """Normal values with a row of zeros, a large one and a far mean: the same on every device."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if x.ndim == 2 and len(x) > 4:
        x[1], x[2], x[3] = 0, 30 * x[2], x[3] + 5
    return x.to(device, dtype)


def quantize(device):
    """quantize_block and quantize_rows."""
    cases = []
    for dtype in HALVES:
        for rows, columns in [(133, 200)] if device.type == "cpu" else [(133, 200), (300, 1536), (300, 5120)]:
            x = _draw(device, rows, columns, dtype=dtype)
            cases += [(f.__name__, lambda f=f, x=x: f(x), None) for f in (quantize_block, quantize_rows)]
    return _first_difference(cases)


def norm(device):
    """row_stats, layer_norm_quantize in both formats and forms, rms_norm."""
    cases = []
    for dtype in HALVES:
        for rows, columns in [(134, 200)] if device.type == "cpu" else [(134, 200), (300, 1536), (300, 5120)]:
            x = _draw(device, rows, columns, dtype=dtype)
            weight, bias = 1 + 0.1 * _draw(device, 2, columns, seed=1)
            shift, scale = 0.5 * _draw(device, 2, 2, columns, seed=2)
            with without_kernels():
                stats = norms.row_stats(x)
            cases += [
                ("row_stats", lambda x=x: norms.row_stats(x), None),
                ("rms_norm", lambda x=x, w=weight: norms.rms_norm(x, w, 1e-6), None),
            ]
            for by_rows in (False, True):
                for given in (
                    {"weight": weight, "bias": bias, "stats": stats},
                    {"shift": shift, "scale": scale, "stats": stats},
                    {"shift": shift, "scale": scale},
                ):
                    run = lambda x=x, given=given, rows=by_rows: norms.layer_norm_quantize(x, 1e-6, **given, rows=rows)  # noqa: E731
                    cases.append(("layer_norm_quantize", run, None))
    return _first_difference(cases)


def int8_mm(device):
    """Every form of the product, in both formats."""
    small = (134, 136, 200)
    sizes = [small] if device.type == "cpu" else [small, (1402, 2176, 384)]  # more tiles than any card has processors
    cases = []
    for m, n, k in sizes:
        for quantized in (quantize_block, quantize_rows):
            with without_kernels():
                x = quantized(_draw(device, m, k))
                weights = [quantized(_draw(device, n, k, seed=seed) / k**0.5) for seed in (1, 2, 3)]
            biases = [_draw(device, 1, n, dtype=torch.bfloat16, seed=seed)[0] for seed in (4, 5, 6)]
            residual = _draw(device, m, n, dtype=torch.bfloat16, seed=7)
            gate = _draw(device, 2, n, seed=8)
            cases += _forms(x, weights, biases, residual, gate, quantized is quantize_block)
    return _first_difference(cases)


def _forms(x, weights, biases, residual, gate, block):
    layer = (*x, *weights[0], biases[0])
    for dtype in HALVES:
        yield "int8_mm", lambda: mm.int8_mm(*layer, out_dtype=dtype), None  # noqa: B023 (run at once)
    yield "int8_mm with GELU", lambda: mm.int8_mm(*layer, gelu=True), None
    if block:
        yield "int8_mm_quantize", lambda: mm.int8_mm_quantize(*layer), None
    yield "int8_mm_residual", lambda: mm.int8_mm_residual(*layer, residual, gate), None
    yield "int8_mm_residual", lambda: mm.int8_mm_residual(*layer, residual, stats=False), None
    yield "int8_mm_qkv", lambda: mm.int8_mm_qkv(*x, *zip(*weights), biases), None


def sla(device):
    """Block means, block map, preparation and attention in both precisions, with norms and rotation and without."""
    cases = []
    for dtype, head_dim, batch, length in ((torch.bfloat16, 128, 1, 333), (torch.float16, 64, 2, 200)):
        qkv, sums, weights, turn, proj = _attention_inputs(device, dtype, head_dim, batch, length)
        for precision in ("bf16", "int8"):
            tolerance = SPARSE[precision]
            for topk in (0.5, 1.0):
                given = topk, precision
                run = lambda a=(qkv, sums, *weights, 1e-6, *turn, *proj, *given): sla_from_qkv(*a)  # noqa: E731
                cases.append((f"sla_from_qkv ({precision}, top-k {topk})", run, tolerance))
            run = lambda a=(*qkv, None, None, 0.5), p=precision: sparse_linear_attention(*a, precision=p)  # noqa: E731
            cases.append((f"sparse_linear_attention ({precision})", run, tolerance))
    return _first_difference(cases)


def _attention_inputs(device, dtype, head_dim, batch, length):
    """q, k, v whose key blocks score far apart, so that rounding cannot choose other ones."""
    heads, half = 2, head_dim // 2
    qkv = _draw(device, 3, batch, length, heads, head_dim)
    block = torch.arange(length, device=device) // 64
    order = (block * 5 % 7).float()  # the best blocks are not the first
    qkv[0] += 1.0
    qkv[1] += 0.4 * order[:, None, None]
    qkv = qkv.to(dtype)
    with without_kernels():
        sums = qkv[:2].float().square().sum((-1, -2)).view(2, 1, -1)
    weights = 1 + 0.1 * _draw(device, 2, heads * head_dim, seed=1)
    angles = 0.3 * _draw(device, length, half, seed=2)  # small turns keep the order of the blocks
    proj = _draw(device, head_dim, head_dim, seed=3) / head_dim**0.5, _draw(device, 1, head_dim, seed=4)[0]
    return qkv, sums, weights, (angles.cos(), angles.sin()), proj


PROBES = {"quantize": quantize, "norm": norm, "int8_mm": int8_mm, "sla": sla}
