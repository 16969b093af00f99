"""Contenders for the linears of a Wan block: float, int8 rows, int8 blocks, and the fused forms a block needs.

Shapes are M x N x K: M tokens through a weight [N, K].
"""

import torch
import torch.nn.functional as F

from ..devices import has_int_mm
from ..dispatch import why_not
from ..int8 import dequantize_block, int8_linear, is_row_scale, operations, quantize_block, quantize_rows, reference
from .harness import Case, Contender, Missing, exact, relative_error

TOKENS_480P, TOKENS_720P = 32760, 75600
SMALL = ((4608, 1536), (1536, 1536), (8960, 1536), (1536, 8960))  # (N, K) of the 1.3B model: qkv, o, ffn up, ffn down
LARGE = ((15360, 5120), (5120, 5120), (13824, 5120), (5120, 13824))  # of the 14B models
CPU_SHAPES = ((1024, 1536, 1536), (1024, 8960, 1536), (1024, 1536, 8960))
QUICK_SHAPES = ((300, 384, 320),)  # ragged rows and columns
INT8, FLOAT = 0.02, {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # largest relative errors
SAMPLE = 160  # rows from each end that are held to the oracle: a whole block and a ragged one


def shapes(device, quick=False) -> list[tuple[int, int, int]]:
    """(M, N, K) of the linears that are measured on a device."""
    if quick:
        return list(QUICK_SHAPES)
    if torch.device(device).type == "cpu":
        return list(CPU_SHAPES)
    return [(m, *nk) for m, sizes in ((TOKENS_480P, SMALL), (TOKENS_480P, LARGE), (TOKENS_720P, LARGE)) for nk in sizes]


def dtype_of(device) -> torch.dtype:
    """What models compute in: bfloat16, on a CPU float32 (unless Triton's interpreter stands in for a card)."""
    cpu = torch.device(device).type == "cpu" and why_not(device, "int8_mm") is not None
    return torch.float32 if cpu else torch.bfloat16


def name_of(dtype) -> str:
    """float32, bf16."""
    return str(dtype).removeprefix("torch.").replace("bfloat16", "bf16")


def compiled(function, quick=False):
    """torch.compile of a chain of ordinary operations; --quick has no time for it."""
    if quick:
        raise Missing("left out by --quick: it compiles")
    return torch.compile(function, dynamic=False)


def row_chain(x):
    """quantize_rows in plain operations."""
    amax = x.float().abs().amax(1, keepdim=True).clamp_min(1e-8)
    scale = amax / torch.full((), 127.0, device=x.device)  # by a number, CUDA multiplies with its rounded reciprocal
    return (x.float() / scale).round().clamp(-128, 127).to(torch.int8), scale


def block_chain(x):
    """quantize_block in plain operations."""
    m, k = x.shape
    blocks = F.pad(x.float(), (0, -k % 128, 0, -m % 128)).unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    amax = blocks.abs().amax((1, 3), keepdim=True).clamp_min(1e-8)
    q = (blocks / amax * 128).round().clamp(-128, 127).to(torch.int8)
    return q.flatten(2).flatten(0, 1)[:m, :k].contiguous(), (amax / 128)[:, 0, :, 0].contiguous()


CHAINS = {quantize_rows: row_chain, quantize_block: block_chain}


class _Operands:
    """x [M, K], weight [N, K] and bias [N], made up, with rows of the exact product."""

    def __init__(self, device, m, n, k, dtype):
        generator = torch.Generator(device).manual_seed(0)
        make = lambda *size: torch.randn(*size, generator=generator, device=device)  # noqa: E731
        self.m, self.n = m, n
        self.x, self.bias = make(m, k).to(dtype), make(n).to(dtype)
        self.weight = make(n, k).div_(k**0.5).to(dtype)
        self.rows = torch.arange(m, device=device)
        if m > 2 * SAMPLE:
            self.rows = torch.cat([self.rows[:SAMPLE], self.rows[-SAMPLE:]])
        self.want = exact(self.x[self.rows]) @ exact(self.weight).t() + exact(self.bias)

    def error(self, y):
        return relative_error(y[self.rows], self.want) if bool(y.isfinite().all()) else float("inf")


def _int_mm_chain(x, w_q, w_scale, bias):
    """Rows of int8 in plain operations."""
    q, scale = row_chain(x)
    return (torch._int_mm(q, w_q.t()).float() * scale * w_scale.t() + bias.float()).to(x.dtype)


def _needs_int_mm(device):
    if not has_int_mm(torch.device(device)):
        raise Missing(f"torch._int_mm does not run on {torch.device(device).type} here")


def _float(o, dtype, quick=False, compile=False):
    def build():
        x, weight, bias = (t.to(dtype) for t in (o.x, o.weight, o.bias))
        run = compiled(F.linear, quick) if compile else F.linear
        return lambda: run(x, weight, bias)

    return build


def _chain(o, quick, compile):
    def build():
        _needs_int_mm(o.x.device)
        weight = quantize_rows(o.weight)
        run = compiled(_int_mm_chain, quick) if compile else _int_mm_chain
        return lambda: run(o.x, *weight, o.bias)

    return build


def _int_mm_alone(o):
    _needs_int_mm(o.x.device)
    (x_q, x_scale), (w_q, w_scale) = quantize_rows(o.x), quantize_rows(o.weight)
    return lambda: (torch._int_mm(x_q, w_q.t()), x_scale, w_scale)


def _ours(o, quantize):
    weight = quantize(o.weight)
    return lambda: int8_linear(o.x, *weight, o.bias)


def where_kernels_compute(device, family, run):
    """run, what turbo-core computes without kernels; Missing where it has none to leave out."""
    if why_not(device, family) is not None:
        raise Missing("it is what turbo-core itself does here")
    return run


def _ours_alone(o, quantize):
    x, weight = quantize(o.x), quantize(o.weight)
    return lambda: operations(o.x.device).int8_mm(*x, *weight, o.bias, o.x.dtype)


def _kitchen(o):
    try:
        import comfy_kitchen
    except ImportError:
        raise Missing("comfy_kitchen is not installed") from None
    weight = quantize_rows(o.weight)
    return lambda: comfy_kitchen.int8_linear(o.x, *weight, o.bias, out_dtype=o.x.dtype)


def _torchao(o, quick):
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        raise Missing("torchao is not installed") from None
    n, k = o.weight.shape
    layer = torch.nn.Linear(k, n, device=o.x.device, dtype=o.x.dtype)
    with torch.no_grad():
        layer.weight.copy_(o.weight)
        layer.bias.copy_(o.bias)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    layer.requires_grad_(False)
    return compiled(lambda: layer(o.x), quick)


def linear_case(device, m, n, k, quick=False) -> Case:
    """A linear: float in, float out, with quantization and without."""
    dtype = dtype_of(device)
    o = _Operands(device, m, n, k, dtype)

    def scaled(result):
        y, x_scale, w_scale = result
        return o.error(y.float() * x_scale * w_scale.t() + o.bias.float())

    def plain(quantize):
        weight = quantize(o.weight)
        return where_kernels_compute(device, "int8_mm", lambda: reference.int8_linear(o.x, *weight, o.bias))

    add = [
        (f"{name_of(dtype)}, F.linear", _float(o, dtype), o.error, FLOAT[dtype]),
        ("bf16, torch.compile", _float(o, torch.bfloat16, quick, True), o.error, FLOAT[torch.bfloat16]),
        ("row, turbo-core", lambda: _ours(o, quantize_rows), o.error, INT8),
        ("block, turbo-core", lambda: _ours(o, quantize_block), o.error, INT8),
        ("row, turbo-core's torch path", lambda: plain(quantize_rows), o.error, INT8),
        ("block, turbo-core's torch path", lambda: plain(quantize_block), o.error, INT8),
        ("row, torch._int_mm chain", _chain(o, quick, False), o.error, INT8),
        ("row, torch._int_mm chain compiled", _chain(o, quick, True), o.error, INT8),
        ("row, comfy_kitchen.int8_linear", lambda: _kitchen(o), o.error, INT8),
        ("row, torchao compiled", lambda: _torchao(o, quick), o.error, INT8),
    ]
    if dtype != torch.bfloat16:
        add.insert(1, ("bf16, F.linear", _float(o, torch.bfloat16), o.error, FLOAT[torch.bfloat16]))
    alone = [
        ("row, turbo-core, product alone", lambda: _ours_alone(o, quantize_rows), o.error, INT8),
        ("block, turbo-core, product alone", lambda: _ours_alone(o, quantize_block), o.error, INT8),
        ("row, torch._int_mm alone, int32 out", lambda: _int_mm_alone(o), scaled, INT8),
    ]
    contenders = [Contender(*c) for c in add] + [Contender(*c, alone=True) for c in alone]
    return Case(f"linear {m} x {n} x {k}", {"m": m, "n": n, "k": k}, contenders, (add[0][0],), flop=2.0 * m * n * k)


class _Gelu(_Operands):
    """The ffn's up projection and GELU, its result in int8 blocks for the down projection."""

    title, formats, bound = "ffn up + GELU", {"block": quantize_block}, 1.5 * INT8  # rounded twice

    def finish(self):
        self.want = F.gelu(self.want, approximate="tanh")

    def chain(self):
        return F.gelu(F.linear(self.x, self.weight, self.bias), approximate="tanh")

    def quantized_weight(self, quantize):
        return quantize(self.weight)

    def product(self, x, weight):
        return operations(self.x.device).int8_mm_quantize(*x, *weight, self.bias)

    def read(self, result):
        return dequantize_block(*result)


class _Residual(_Gelu):
    """A linear, its gate and the residual; in the block format ours also makes the row statistics of the next norm."""

    title, formats, bound = "linear + gate + residual", {"row": quantize_rows, "block": quantize_block}, INT8

    def finish(self):
        self.residual, self.gate = self.x.new_ones(self.m, self.n), torch.full_like(self.bias, 0.5)
        self.want = exact(self.residual[self.rows]) + exact(self.gate) * self.want

    def chain(self):
        return torch.addcmul(self.residual, F.linear(self.x, self.weight, self.bias), self.gate)

    def product(self, x, weight):
        layer = *x, *weight, self.bias, self.residual, self.gate.float()[None]
        return operations(self.x.device).int8_mm_residual(*layer, stats=not is_row_scale(*weight))

    def read(self, result):
        return result[0]


class _Qkv(_Residual):
    """q, k and v from one input; ours also makes the sums of squares that their RMSNorm needs."""

    title = "q, k, v from one input"

    def finish(self):
        pass

    def chain(self):
        return F.linear(self.x, self.weight, self.bias)

    def quantized_weight(self, quantize):
        return tuple(map(list, zip(*map(quantize, self.weight.chunk(3)))))

    def product(self, x, weight):
        return operations(self.x.device).int8_mm_qkv(*x, *weight, self.bias.chunk(3), self.x.dtype)

    def read(self, result):
        return torch.cat(result[0].unbind(0), 1)


FUSED = {"gelu": _Gelu, "residual": _Residual, "qkv": _Qkv}


def fused_case(device, kind, m, n, k, quick=False) -> Case:
    """A linear with what follows it in a block: "gelu", "residual" or "qkv"."""
    dtype = dtype_of(device)
    o = FUSED[kind](device, m, n, k, dtype)
    o.finish()
    name = name_of(dtype)

    def error(result):
        return o.error(o.read(result))

    def whole(quantize):
        weight = o.quantized_weight(quantize)
        return lambda: o.product(quantize(o.x), weight)

    def alone(quantize):
        x, weight = quantize(o.x), o.quantized_weight(quantize)
        return lambda: o.product(x, weight)

    contenders = [
        Contender(f"{name}, eager chain", lambda: o.chain, o.error, FLOAT[dtype]),
        Contender(f"{name}, torch.compile", lambda: compiled(o.chain, quick), o.error, FLOAT[dtype]),
    ]
    for form, quantize in o.formats.items():
        contenders += [
            Contender(f"{form}, turbo-core", lambda q=quantize: whole(q), error, o.bound),
            Contender(f"{form}, turbo-core, product alone", lambda q=quantize: alone(q), error, o.bound, alone=True),
        ]
    title = f"{o.title} {m} x {n} x {k}"
    return Case(title, {"m": m, "n": n, "k": k}, contenders, (contenders[0].name,), flop=2.0 * m * n * k)


def kinds(n, k) -> list[str]:
    """The fused forms that a weight [N, K] of a Wan model has; q, k, v lie three times as wide as deep."""
    return ["qkv"] if n == 3 * k else ["gelu"] if n > k else ["residual"]


def cases(device, sizes=None, quick=False):
    """Yield the function that makes each case: one case's operands live at a time."""
    for m, n, k in sizes or shapes(device, quick):
        yield lambda m=m, n=n, k=k: linear_case(device, m, n, k, quick)
        for kind in FUSED if quick and n % 3 == 0 else kinds(n, k):
            yield lambda m=m, n=n, k=k, kind=kind: fused_case(device, kind, m, n, k, quick)
