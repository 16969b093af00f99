"""Contenders for what stands between products: quantization, norms, modulation. Bound by memory.

Shapes are M x K: M tokens, of the VAE pixels, of K channels. Bytes are those of one read and one write of everything.
"""

import torch
import torch.nn.functional as F

from ..channels.paths import operations as channel_operations
from ..int8 import dequantize, operations, quantize_block, quantize_rows
from .harness import Case, Contender, Missing, exact, relative_error
from .linear import SAMPLE, TOKENS_480P, TOKENS_720P, block_chain, compiled, dtype_of, row_chain

CPU_SHAPES = ((1024, 1536),)
QUICK_SHAPES = ((300, 320),)  # ragged blocks both ways
INT8 = 0.03  # of values with outliers
EPS = 1e-6


def shapes(device, quick=False) -> list[tuple[int, int]]:
    """(M, K) of the streaming cases of a device."""
    if quick:
        return list(QUICK_SHAPES)
    if torch.device(device).type == "cpu":
        return list(CPU_SHAPES)
    return [(TOKENS_480P, 1536), (TOKENS_480P, 5120), (TOKENS_720P, 5120)]


class _Operands:
    """x [M, K] with outlier channels and an offset, a shift and a scale of one sample; rows of exact results."""

    def __init__(self, device, m, k):
        self.dtype = dtype_of(device)
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(m, k, generator=generator, device=device).add_(0.5)
        x[:, :: k // 8] *= 4
        self.x = x.to(self.dtype)
        self.shift, self.scale = (torch.randn(1, k, generator=generator, device=device) * 0.2 for _ in range(2))
        self.weight = torch.rand(k, generator=generator, device=device) + 0.5
        self.rows = torch.arange(m, device=device)
        if m > 2 * SAMPLE:
            self.rows = torch.cat([self.rows[:SAMPLE], self.rows[-SAMPLE:]])

    def judge(self, want):
        """Error of a float [M, K] or of its int8 form (q, scale), by the rows of the oracle."""

        def error(y):
            y = dequantize(*y) if isinstance(y, tuple) else y
            return relative_error(y[self.rows], want) if bool(y.isfinite().all()) else float("inf")

        return error


def _modulate_chain(x, shift, scale):
    """LayerNorm and modulation as the reference and wan.py have them."""
    return torch.addcmul(shift, F.layer_norm(x.float(), x.shape[-1:], eps=EPS), 1 + scale).to(x.dtype)


def _kitchen():
    try:
        import comfy_kitchen
    except ImportError:
        raise Missing("comfy_kitchen is not installed") from None
    return comfy_kitchen


def quantize_case(device, m, k, rows, quick=False) -> Case:
    """Quantization alone, in one of the formats."""
    o = _Operands(device, m, k)
    error, chain = o.judge(exact(o.x[o.rows])), row_chain if rows else block_chain
    quantize = quantize_rows if rows else quantize_block

    def plain(run):
        return lambda: run(o.x)

    def kitchen():
        run = _kitchen().quantize_int8_rowwise
        return lambda: run(o.x)

    contenders = [
        Contender("eager chain", lambda: plain(chain), error, INT8),
        Contender("torch.compile", lambda: plain(compiled(chain, quick)), error, INT8),
        Contender("turbo-core", lambda: plain(quantize), error, INT8),
    ]
    if rows:
        contenders.append(Contender("comfy_kitchen.quantize_int8_rowwise", kitchen, error, INT8))
    name = f"quantize {'rows' if rows else 'blocks'} {m} x {k}"
    size = o.x.element_size()
    return Case(name, {"m": m, "k": k}, contenders, ("eager chain",), bytes=float(m * k * (size + 1)), streaming=True)


def modulate_case(device, m, k, rows, quick=False) -> Case:
    """LayerNorm, modulation and quantization (K1 and K10 of a block)."""
    o = _Operands(device, m, k)
    normed = F.layer_norm(exact(o.x[o.rows]), (k,), eps=EPS)
    error = o.judge(normed * (1 + exact(o.scale)) + exact(o.shift))
    quantize = row_chain if rows else block_chain

    def chain(x, shift, scale):
        return quantize(_modulate_chain(x, shift, scale))

    def plain(run):
        return lambda: run(o.x, o.shift, o.scale)

    def own(given):
        run = operations(o.x.device)
        stats = run.row_stats(o.x) if given else None
        return lambda: run.layer_norm_quantize(o.x, EPS, shift=o.shift, scale=o.scale, stats=stats, rows=rows)

    def kitchen():
        library = _kitchen()
        given = o.scale.to(o.dtype), o.shift.to(o.dtype)
        return lambda: library.quantize_int8_rowwise(library.adaln(o.x, *given, EPS))

    contenders = [
        Contender("eager chain", lambda: plain(chain), error, INT8),
        Contender("torch.compile", lambda: plain(compiled(chain, quick)), error, INT8),
        Contender("turbo-core, reading its own statistics", lambda: own(False), error, INT8),
        Contender("turbo-core, statistics given", lambda: own(True), error, INT8),
    ]
    if rows:
        contenders.append(Contender("comfy_kitchen adaln + quantize", kitchen, error, INT8))
    name = f"LayerNorm + modulate + quantize {'rows' if rows else 'blocks'} {m} x {k}"
    size = o.x.element_size()
    return Case(name, {"m": m, "k": k}, contenders, ("eager chain",), bytes=float(m * k * (size + 1)), streaming=True)


def rms_case(device, m, k, quick=False) -> Case:
    """RMSNorm over the full width, float to float."""
    o = _Operands(device, m, k)
    x = exact(o.x[o.rows])
    error = o.judge(x * (x.square().mean(1, keepdim=True) + EPS).rsqrt() * exact(o.weight))
    bound = 1e-5 if o.dtype == torch.float32 else 1e-2

    def chain(x, weight):
        return F.rms_norm(x.float(), (k,), weight, EPS).to(x.dtype)

    def plain(run):
        return lambda: run(o.x, o.weight)

    def own():
        run = operations(o.x.device)
        return lambda: run.rms_norm(o.x, o.weight, EPS)

    contenders = [
        Contender("eager chain", lambda: plain(chain), error, bound),
        Contender("torch.compile", lambda: plain(compiled(chain, quick)), error, bound),
        Contender("turbo-core", own, error, bound),
    ]
    bytes = 2.0 * m * k * o.x.element_size()
    return Case(f"RMSNorm {m} x {k}", {"m": m, "k": k}, contenders, ("eager chain",), bytes=bytes, streaming=True)


def norm_silu_case(device, m, k, quick=False) -> Case:
    """RMSNorm over channels and SiLU, as before each convolution of the Wan VAE: M pixels of K channels."""
    o = _Operands(device, m, k)
    gamma = o.weight.to(o.dtype)
    error = o.judge(F.silu(F.normalize(exact(o.x[o.rows]), dim=1, eps=1e-12) * k**0.5 * exact(gamma)))
    bound = 1e-5 if o.dtype == torch.float32 else 1e-2

    def chain(x, gamma):
        return F.silu(F.normalize(x.float(), dim=1, eps=1e-12) * k**0.5 * gamma.float()).to(x.dtype)

    def plain(run):
        return lambda: run(o.x, gamma)

    contenders = [
        Contender("eager chain", lambda: plain(chain), error, bound),
        Contender("torch.compile", lambda: plain(compiled(chain, quick)), error, bound),
        Contender("turbo-core", lambda: plain(channel_operations(o.x.device).norm_silu), error, bound),
    ]
    bytes = 2.0 * m * k * o.x.element_size()
    name = f"RMSNorm over channels + SiLU {m} x {k}"
    return Case(name, {"m": m, "k": k}, contenders, ("eager chain",), bytes=bytes, streaming=True)


def cases(device, sizes=None, quick=False):
    """Yield the function that makes each case."""
    for m, k in sizes or shapes(device, quick):
        for rows in (False, True):
            yield lambda m=m, k=k, rows=rows: quantize_case(device, m, k, rows, quick)
            yield lambda m=m, k=k, rows=rows: modulate_case(device, m, k, rows, quick)
        yield lambda m=m, k=k: rms_case(device, m, k, quick)
        yield lambda m=m, k=k: norm_silu_case(device, m, k, quick)
