"""Contenders for a whole Wan block: float and eager, int8, sparse-linear, and all of it together.

Shapes are L x DIM: 1536 is the 1.3B model, 5120 the 14B ones. The weights are random, so attention is nearly even and
a block map is chosen by chance: sparse contenders are held to the sparse block in float32 by a wider bound.
"""

import copy
import math

import torch
import torch.nn.functional as F

from ..devices import widest_float
from ..dispatch import why_not
from ..errors import TurboError
from ..int8 import quantize_block, quantize_rows
from ..rope import rope_angles
from ..sla import reference
from ..wan import QUANTIZED_LINEARS, Block, Int8Linear
from .attention import LOW_BIT_IN_TORCH, TEXT, TOPK
from .harness import Case, Contender, Missing, relative_error
from .linear import TOKENS_480P, TOKENS_720P, compiled, dtype_of, name_of

HEAD_DIM, EPS = 128, 1e-6
FFN = {1536: 8960, 5120: 13824, 256: 512}
CARD_SHAPES = ((TOKENS_480P, 1536), (TOKENS_480P, 5120), (TOKENS_720P, 5120))
CPU_SHAPES = ((9360, 1536),)  # six latent frames at 832 x 480
BLOCKS = {1536: 30, 5120: 40}  # of the models of this width
TEACHER, STUDENT = 100, 4  # evaluations of a clip: 50 steps with guidance, 4 without
QUICK_SHAPES = ((300, 256),)
TRIED = 1430  # tokens on which the results are compared, ragged in blocks of 128 and of 64
FLOAT, INT8 = {torch.float32: 1e-5, torch.bfloat16: 2e-2}, 4e-2  # largest errors of what a block adds


def shapes(device, quick=False) -> list[tuple[int, int]]:
    """(L, DIM) of the blocks that are measured on a device."""
    if quick:
        return list(QUICK_SHAPES)
    return list(CPU_SHAPES if torch.device(device).type == "cpu" else CARD_SHAPES)


def plain(block, x, modulation, context, angles, attend):
    """The block in plain operations, as the reference computes it: float norms, one operation after another.

    attend(q, k, v [B, L, H, D]) -> [B, L, H, D] is the self-attention.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    shift1, scale1, gate1, shift2, scale2, gate2 = (block.modulation + modulation).chunk(6, 1)
    dim = x.shape[-1:]

    def norm(x, weight=None, bias=None):
        return F.layer_norm(x.to(wide), dim, weight, bias, EPS)

    def rms(x, norm):
        return F.rms_norm(x.to(wide), dim, norm.weight, EPS).to(x.dtype)

    def heads(x):
        return x.unflatten(-1, (-1, HEAD_DIM))

    def rope(x):
        even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)

    a, c = block.self_attn, block.cross_attn
    y = (norm(x) * (1 + scale1) + shift1).to(x.dtype)
    q, k, v = rope(heads(rms(a.q(y), a.norm_q))), rope(heads(rms(a.k(y), a.norm_k))), heads(a.v(y))
    x = x + a.o(attend(q, k, v).flatten(2)) * gate1.to(x.dtype)
    y = norm(x, block.norm3.weight, block.norm3.bias).to(x.dtype)
    q, k, v = heads(rms(c.q(y), c.norm_q)), heads(rms(c.k(context), c.norm_k)), heads(c.v(context))
    x = x + c.o(dense(q, k, v).flatten(2))
    y = (norm(x) * (1 + scale2) + shift2).to(x.dtype)
    return x + block.ffn(y) * gate2.to(x.dtype)


def dense(q, k, v):
    """Attention of [B, L, H, D] by torch."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


class _Operands:
    """A block, its inputs at full length and at the length where results are compared."""

    def __init__(self, device, length, dim):
        if dim % HEAD_DIM:
            raise TurboError(f"a block's DIM must be a multiple of {HEAD_DIM}, got {dim}")
        self.dtype, self.ffn = dtype_of(device), FFN.get(dim, 4 * dim)
        generator = torch.Generator(device).manual_seed(0)
        make = lambda *size: torch.randn(*size, generator=generator, device=device)  # noqa: E731
        with torch.device("meta"):
            block = Block(dim, self.ffn, dim // HEAD_DIM, EPS, sla=True)
        self.block = block.to_empty(device=device).requires_grad_(False).eval()
        for name, weight in self.block.named_parameters():
            weight.copy_(make(*weight.shape) / math.sqrt(weight.shape[-1]))
            if "norm" in name and name.endswith("weight"):
                weight.fill_(1.0)
        self.made = {}
        self.modulation, self.context = make(1, 6, dim) * 0.5, make(1, TEXT, dim)
        self.full, self.tried = (self._inputs(n, dim, make) for n in (length, min(TRIED, length)))
        self.want = {sparse: self.reference(sparse) for sparse in (False, True)}

    def _inputs(self, length, dim, make):
        return make(1, length, dim), rope_angles((1, 1, length), HEAD_DIM, self.modulation.device)

    def sparse(self, q, k, v):
        proj = self.block.self_attn.proj_l
        return reference.sparse_linear_attention(q, k, v, proj.weight, proj.bias, TOPK, None, 128, 64, "bf16")

    def reference(self, sparse):
        """What the block adds to x, in plain operations, as wide as the device can."""
        wide = widest_float(self.modulation.device)
        block = copy.deepcopy(self.block).to(wide)
        x, modulation, context, angles = (
            t.to(wide) for t in (self.tried[0], self.modulation, self.context, self.tried[1])
        )
        return plain(block, x, modulation, context, angles, self.sparse if sparse else dense) - x

    def arguments(self, inputs):
        x, angles = inputs
        return x.to(self.dtype), self.modulation, self.context.to(self.dtype), angles

    def float_block(self):
        """A copy whose matrices are in the dtype that the device computes in."""
        if "float" not in self.made:
            block = self.made["float"] = copy.deepcopy(self.block)
            for name in QUANTIZED_LINEARS:
                block.get_submodule(name).to(self.dtype)
        return self.made["float"]

    def int8_block(self, quantize):
        """A copy whose ten linears are int8."""
        if quantize not in self.made:
            block = self.made[quantize] = copy.deepcopy(self.block)
            for name in QUANTIZED_LINEARS:
                layer = block.get_submodule(name)
                block.set_submodule(name, Int8Linear(*quantize(layer.weight), layer.bias.to(self.dtype)))
        return self.made[quantize]

    def contender(self, name, block, bound, sparse=False, call=None, note=""):
        """call(block, x, modulation, context, angles) -> x after it; block is made when it is needed."""

        def build():
            made = block()
            arguments, tried = self.arguments(self.full), self.arguments(self.tried)

            def run(inputs=arguments):
                return call(made, *inputs)

            run.tried = lambda: run(tried)
            return run

        return Contender(name, lambda: _Run(build()), self.judge(sparse), bound, note=note)

    def judge(self, sparse):
        def error(result):
            y, run = result
            got = run.tried().float() - self.arguments(self.tried)[0].float()
            return relative_error(got, self.want[sparse]) if bool(y.isfinite().all()) else float("inf")

        return error


class _Run:
    """The function to time; its result brings the function itself, for the comparison at the smaller length."""

    def __init__(self, run):
        self.run = run

    def __call__(self):
        return self.run(), self.run


def block_case(device, length, dim, quick=False) -> Case:
    """A block of the model of this width."""
    o = _Operands(device, length, dim)
    name = name_of(o.dtype)
    on_cpu = torch.device(device).type == "cpu"
    emulated = "" if why_not(device, "sla") is None else LOW_BIT_IN_TORCH

    def eager(block, *arguments):
        return plain(block, *arguments, dense)

    def eager_sparse(block, *arguments):
        return plain(block, *arguments, o.sparse)

    def model(topk, precision):
        return lambda block, *arguments: block(*arguments, topk, precision)

    def compile_once():
        if on_cpu:
            raise Missing("on a CPU it compiles for longer than it runs")
        run = compiled(plain, quick)
        block = o.float_block()
        return lambda *arguments: run(block, *arguments, dense)

    sparse_bound = 3 * INT8
    base = f"{name}, eager, dense"
    contenders = [
        o.contender(base, o.float_block, FLOAT[o.dtype], call=eager),
        o.contender(f"{name}, torch.compile, dense", compile_once, FLOAT[o.dtype], call=lambda f, *rest: f(*rest)),
        o.contender(f"{name}, eager, SLA in torch", o.float_block, sparse_bound, True, eager_sparse),
    ]
    for form, quantize in (("row", quantize_rows), ("block", quantize_block)):
        make = lambda quantize=quantize: o.int8_block(quantize)  # noqa: E731
        contenders += [
            o.contender(f"int8 {form}, turbo-core, dense", make, INT8, call=model(None, "bf16")),
            o.contender(f"int8 {form}, turbo-core, SLA", make, sparse_bound, True, model(TOPK, "bf16")),
            o.contender(f"int8 {form}, turbo-core, SageSLA", make, sparse_bound, True, model(TOPK, "int8"), emulated),
        ]
    linears = 2.0 * length * dim * (6 * dim + 2 * o.ffn) + 4.0 * TEXT * dim * dim
    flop = linears + 4.0 * length * (length + TEXT) * dim
    shape = {"l": length, "dim": dim, "ffn": o.ffn}
    title = f"Wan block, {length} tokens, dim {dim}, ffn {o.ffn}"
    notes = [f"errors: of what the block adds, at {min(TRIED, length)} tokens; rates count dense attention's work"]
    return Case(title, shape, contenders, (base,), flop=flop, notes=notes)


def derived(measured: dict) -> dict | None:
    """A case more, computed from a measured one: all blocks of a clip, and what each part of the method takes off it.
    None for a width that no model has, or where a rung was not measured."""
    rows, blocks = {row["name"]: row for row in measured["rows"] if "ms" in row}, BLOCKS.get(measured["shape"]["dim"])
    base = measured["baseline"]
    rungs = [(base, base, TEACHER)]
    for form in ("block", "row"):
        dense, sparse = f"int8 {form}, turbo-core, dense", f"int8 {form}, turbo-core, SLA"
        rungs += [
            (f"turbo-core: + W8A8 in {form}s", dense, TEACHER),
            (f"turbo-core: + W8A8 in {form}s + SLA", sparse, TEACHER),
            (f"turbo-core: + W8A8 in {form}s + SLA + {STUDENT} steps", sparse, STUDENT),
        ]
    if blocks is None or not all(source in rows for _, source, _ in rungs):
        return None
    found = []
    for name, source, evaluations in rungs:
        row, times = rows[source], blocks * evaluations
        told = {key: row[key] * times for key in ("ms", "p10", "p90")}
        speedup = float(f"{rows[base]['ms'] * blocks * TEACHER / told['ms']:.3g}")
        found.append({"name": name, "alone": False, "status": "ok", "note": "", "error": row["error"]} | told)
        found[-1]["speedup"] = speedup
    title = f"All blocks of a clip: {blocks}, {TEACHER} evaluations (50 steps with guidance) or {STUDENT}"
    notes = ["computed from the times above, not run", "errors: of one block"]
    return measured | {"name": title, "rows": found, "notes": notes, "clocks": {}, "flop": 0.0}


def cases(device, sizes=None, quick=False):
    """Yield the function that makes each case."""
    for size in sizes or shapes(device, quick):
        yield lambda size=size: block_case(device, *size, quick)
