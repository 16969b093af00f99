"""Contenders for attention: dense, dense in low bits, and sparse-linear, each with all its preparation and in parts.

Shapes are B x H x L x D. Dense contenders are held to exact attention, sparse ones to exact attention over the blocks
that the block map keeps; both on sampled heads and query blocks, so that nothing of size L x L is built.
"""

import contextlib
import importlib
import math

import torch
import torch.nn.functional as F

from .. import sla
from ..dispatch import why_not
from ..sla import reference
from .harness import Case, Contender, Missing, exact, in_short, relative_error
from .linear import TOKENS_480P, TOKENS_720P, compiled, dtype_of, name_of, where_kernels_compute
from .rivals import kitchen

TOPK, BLOCK_Q, BLOCK_K = 0.1, 128, 64
MORE = (0.15, 0.3)  # what the authors advise, and a gentle one
CARD_SHAPES = ((1, 12, TOKENS_480P, 128), (1, 40, TOKENS_480P, 128), (1, 40, TOKENS_720P, 128))
CPU_SHAPES = ((1, 2, 4096, 128), (1, 2, 20000, 128))
QUICK_SHAPES = ((1, 2, 1000, 64),)  # ragged blocks of queries and of keys
TEXT = 512  # keys of cross-attention
FILES = ("sla_pool", "block_map", "sla_prepare", "sla_attention")  # of kernels/
STAGES = ("pool_means", "block_map", "prepare", "attention")  # the wrappers in them
LOW_BIT, FEW_KEYS, OTHER_LOW_BIT = 0.02, 0.04, 0.05  # largest errors: ours, ours where few keys average, others' int8
LOW_BIT_IN_TORCH = "in torch: scores of int8 where the device multiplies it, values rounded to fp8 in float32"
FLOAT = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def shapes(device, quick=False) -> list[tuple[int, int, int, int]]:
    """(B, H, L, D) of the attention that is measured on a device."""
    if quick:
        return list(QUICK_SHAPES)
    return list(CPU_SHAPES if torch.device(device).type == "cpu" else CARD_SHAPES)


def made_up(device, b, h, length, d, keys=None, dtype=torch.bfloat16):
    """q, k, v [B, L, H, D] with what real ones have: smooth along the tokens, outlier channels, a common key offset."""
    generator = torch.Generator(device).manual_seed(0)
    make = lambda *size: torch.randn(*size, generator=generator, device=device)  # noqa: E731
    waves = 16

    def smooth(tokens):
        phase = torch.linspace(0, 1, tokens, device=device)[:, None] * frequency + offset
        return torch.cat([phase.sin(), phase.cos()], 1)  # [tokens, 2 * waves]

    frequency, offset = make(waves).abs() * 60, make(waves)
    mix = make(h, 2 * waves, d) / math.sqrt(waves)
    outliers = torch.ones(d, device=device)
    outliers[:: d // 4] = 3
    q = torch.einsum("lw,hwd->lhd", smooth(length), mix) * outliers
    k = torch.einsum("lw,hwd->lhd", smooth(keys or length), mix) + 2 * make(h, d)
    noise = [0.5 * make(b, tokens, h, d) for tokens in (length, keys or length)]
    v = make(b, keys or length, h, d) + make(h, d)
    return (q + noise[0]).to(dtype), (k + noise[1]).to(dtype), v.to(dtype)


class _Operands:
    """q, k, v, proj_l and the exact result of sampled query blocks."""

    def __init__(self, device, b, h, length, d, keys=None):
        self.dtype = dtype_of(device)
        self.q, self.k, self.v = made_up(device, b, h, length, d, keys, self.dtype)
        generator = torch.Generator(device).manual_seed(1)
        self.weight = torch.randn(d, d, generator=generator, device=device) / math.sqrt(d)
        self.bias = torch.randn(d, generator=generator, device=device) * 0.1
        blocks = -(-length // BLOCK_Q)
        heads, blocks = sorted({0, h - 1}), sorted({0, blocks // 2, blocks - 1})
        self.samples = [(0, head, block) for head in heads for block in blocks]

    def rows(self, block):
        return slice(block * BLOCK_Q, (block + 1) * BLOCK_Q)

    def exact(self, index=None, linear=False):
        """One float64 [rows, D] for each sample: dense, or over the key blocks of index [B, H, blocks, kept]."""
        found = []
        for batch, head, block in self.samples:
            q = exact(self.q[batch, self.rows(block), head])
            k, v = exact(self.k[batch, :, head]), exact(self.v[batch, :, head])
            keep = slice(None)
            if index is not None:
                tokens = index[batch, head, block].long().cpu()[:, None] * BLOCK_K + torch.arange(BLOCK_K)
                keep = tokens.flatten()[tokens.flatten() < len(k)].to(k.device)
            y = ((q @ k[keep].t()) * q.shape[-1] ** -0.5).softmax(-1) @ v[keep]
            if linear:
                cq, ck = q.softmax(-1), k.softmax(-1)
                y += (cq @ (ck.t() @ v) / (1e-5 + cq @ ck.sum(0)[:, None])) @ exact(self.weight).t() + exact(self.bias)
            found.append(y)
        return torch.cat(found)

    def judge(self, want):
        """The error of a result [B, L, H, D] by the samples."""

        def error(y):
            if not bool(y.isfinite().all()):
                return float("inf")
            got = torch.cat([y[batch, self.rows(block), head] for batch, head, block in self.samples])
            return relative_error(got, want)

        return error


def _transposed(o):
    return [x.transpose(1, 2) for x in (o.q, o.k, o.v)]


def _sdpa(o, backend=None):
    """torch's own attention, by one backend or by torch's choice."""
    tensors = _transposed(o)
    if backend is None:
        return lambda: F.scaled_dot_product_attention(*tensors).transpose(1, 2)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if o.q.device.type != "cuda":
        raise Missing(f"a backend of cards, there is none on {o.q.device.type}")
    kind = getattr(SDPBackend, backend, None)
    if kind is None:
        raise Missing(f"torch {torch.__version__} has no backend {backend}")

    def run():
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(*tensors).transpose(1, 2)

    return run


def _sage(o):
    try:
        from sageattention import sageattn
    except ImportError:
        raise Missing("sageattention is not installed") from None
    if o.q.device.type != "cuda":
        raise Missing("sageattention needs a card")
    q, k, v = o.q, o.k.clone(), o.v  # version 1 takes the mean off k where it lies
    return lambda: sageattn(q, k, v, tensor_layout="NHD", is_causal=False)


def _kitchen_int8(o):
    run, tensors = kitchen(o.q.device, "int8_attention"), _transposed(o)
    return lambda: run(*tensors).transpose(1, 2)


def _kitchen_sol(o):
    run = kitchen(o.q.device, "sol_attn")
    return lambda: run(o.q, o.k, o.v, topk_ratio=TOPK)


def _table(o, index):
    """A block map as bool [B, H, query blocks, key blocks]."""
    table = torch.zeros(*index.shape[:3], -(-o.k.shape[1] // BLOCK_K), dtype=torch.bool, device=index.device)
    return table.scatter_(3, index.long(), True)


def _flex(o, index, quick):
    """flex_attention over the same blocks. Only its compiled form looks at the block mask."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    b, h, blocks, kept = index.shape
    table = _table(o, index)
    indices = torch.zeros(table.shape, dtype=torch.int32, device=index.device)
    indices[..., :kept] = index
    full = torch.full((b, h, blocks), kept, dtype=torch.int32, device=index.device)
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(full),
        torch.zeros_like(indices),
        full,
        indices,
        BLOCK_SIZE=(BLOCK_Q, BLOCK_K),
        mask_mod=lambda batch, head, q, k: table[batch, head, q // BLOCK_Q, k // BLOCK_K],
        seq_lengths=(o.q.shape[1], o.k.shape[1]),
    )
    tensors = _transposed(o)
    options = {"BLOCK_M": BLOCK_Q, "BLOCK_N": BLOCK_K} if o.q.device.type == "cuda" else None
    run = compiled(lambda q, k, v: flex_attention(q, k, v, block_mask=mask, kernel_options=options), quick)
    return lambda: run(*tensors).transpose(1, 2)


def _ours(o, precision, linear, topk=TOPK):
    proj = (o.weight, o.bias) if linear else (None, None)
    return lambda: sla.sparse_linear_attention(o.q, o.k, o.v, *proj, topk, precision=precision)


def _by_torch(o):
    given = o.q, o.k, o.v, o.weight, o.bias, TOPK, None, BLOCK_Q, BLOCK_K, "bf16"
    return where_kernels_compute(o.q.device, "sla", lambda: reference.sparse_linear_attention(*given))


@contextlib.contextmanager
def recorded():
    """{kernel wrapper: (function, arguments, keywords, result)} of the calls made to attention kernels meanwhile."""
    calls, restore = {}, []
    modules = [importlib.import_module(f"...kernels.{file}", __name__) for file in FILES]
    for module in modules:
        for name in STAGES:
            function = getattr(module, name, None)
            if function is None:
                continue

            def record(*arguments, _name=name, _function=function, **keywords):
                result = _function(*arguments, **keywords)
                calls[_name] = (_function, arguments, keywords, result)
                return result

            restore.append((module, name, function))
            setattr(module, name, record)
    try:
        yield calls
    finally:
        for module, name, function in restore:
            setattr(module, name, function)


def _stage(o, name, precision):
    """One kernel wrapper by itself, with the operands that the whole gave it."""
    reason = why_not(o.q.device, "sla")
    if reason is not None:
        raise Missing(reason)
    with recorded() as calls:
        _ours(o, precision, True)()
    if name not in calls:
        raise Missing("the whole does not call it here")
    function, arguments, keywords, _ = calls.pop(name)
    calls.clear()
    return lambda: function(*arguments, **keywords)


def kept_index(o):
    """(the block map that turbo-core uses here, a note on how it compares with the torch one)."""
    index = sla.block_map(o.q, o.k, TOPK)
    if why_not(o.q.device, "sla") is not None:
        return index, []
    try:
        with recorded() as calls:
            _ours(o, "bf16", True)()
    except Exception as error:  # the kernels': their contenders will say the same, the others go on
        return index, [f"block map of the kernel: {in_short(error)}"]
    own = calls["block_map"][3]
    same = (_table(o, own) & _table(o, index)).sum().item() / own.numel()
    return own, [f"block map: kernel and torch reference agree on {same:.3%} of the kept blocks"]


def attention_case(device, b, h, length, d, quick=False) -> Case:
    """Self-attention: dense, dense in low bits, sparse with and without the linear branch, and the parts of ours."""
    o = _Operands(device, b, h, length, d)
    index, notes = kept_index(o)
    dense_flop = 4.0 * b * h * length * length * d
    sparse_flop = dense_flop * index.shape[-1] / -(-length // BLOCK_K)
    linear_flop = sparse_flop + 4.0 * b * h * length * d * d
    dense, sparse, linear = o.judge(o.exact()), o.judge(o.exact(index)), o.judge(o.exact(index, True))
    float_bound = FLOAT[o.dtype]
    name = name_of(o.dtype)
    emulated = "" if why_not(device, "sla") is None else LOW_BIT_IN_TORCH

    low_bit_bound = LOW_BIT if length >= 512 else FEW_KEYS

    def low_bit(name, build, error, flop):
        return Contender(name, build, error, low_bit_bound, flop=flop, note=emulated)

    percent = f"{TOPK:.0%}"
    contenders = [
        Contender("dense, SDPA", lambda: _sdpa(o), dense, float_bound),
        Contender("dense, SDPA flash", lambda: _sdpa(o, "FLASH_ATTENTION"), dense, float_bound),
        Contender("dense, SDPA cuDNN", lambda: _sdpa(o, "CUDNN_ATTENTION"), dense, float_bound),
        Contender("dense int8, sageattention", lambda: _sage(o), dense, OTHER_LOW_BIT),
        Contender("dense int8, comfy_kitchen.int8_attention", lambda: _kitchen_int8(o), dense, OTHER_LOW_BIT),
        low_bit("dense int8, turbo-core", lambda: _ours(o, "int8", False, 1.0), dense, None),
        Contender(
            f"sparse {percent}, flex_attention compiled", lambda: _flex(o, index, quick), sparse, float_bound,
            flop=sparse_flop,
        ),
        Contender(
            f"sparse {percent}, comfy_kitchen.sol_attn", lambda: _kitchen_sol(o), dense, None, flop=sparse_flop,
            note="its own blocks and a pooled rest: error against dense",
        ),
        Contender(
            f"sparse {percent}, turbo-core {name}", lambda: _ours(o, "bf16", False), sparse, float_bound,
            flop=sparse_flop,
        ),
        low_bit(f"sparse {percent}, turbo-core int8", lambda: _ours(o, "int8", False), sparse, sparse_flop),
        Contender(
            f"SLA {percent}, turbo-core {name}", lambda: _ours(o, "bf16", True), linear, float_bound, flop=linear_flop
        ),
        low_bit(f"SageSLA {percent}, turbo-core int8", lambda: _ours(o, "int8", True), linear, linear_flop),
        Contender(
            f"SLA {percent}, turbo-core's torch path", lambda: _by_torch(o), linear, float_bound, flop=linear_flop,
        ),
    ]  # fmt: skip
    for topk in MORE:
        wider = sla.block_map(o.q, o.k, topk)
        kept_flop = dense_flop * wider.shape[-1] / -(-length // BLOCK_K) + 4.0 * b * h * length * d * d
        contenders.append(
            Contender(
                f"SLA {topk:.0%}, turbo-core {name}", lambda topk=topk: _ours(o, "bf16", True, topk),
                o.judge(o.exact(wider, True)), float_bound, flop=kept_flop,
            )
        )  # fmt: skip
    for stage in STAGES:
        error = linear if stage == "attention" else None
        for precision in ("int8",) if error is None else ("bf16", "int8"):
            contenders.append(
                Contender(
                    f"{stage} alone, {precision}",
                    lambda stage=stage, precision=precision: _stage(o, stage, precision),
                    error,
                    (low_bit_bound if precision == "int8" else float_bound) if error else None,
                    alone=True,
                    flop=sparse_flop + 2.0 * b * h * length * d * d if error else 0.0,
                    note="turbo-core",
                )
            )
    baselines = "dense, SDPA cuDNN", "dense, SDPA flash", "dense, SDPA"
    shape = {"b": b, "h": h, "l": length, "d": d}
    title = f"attention {b} x {h} x {length} x {d}, {index.shape[-1]} of {-(-length // BLOCK_K)} key blocks kept"
    return Case(title, shape, contenders, baselines, flop=dense_flop, notes=notes)


def cross_case(device, b, h, length, d, quick=False) -> Case:
    """Cross-attention over the text's keys: always dense."""
    o = _Operands(device, b, h, length, d, TEXT)
    dense, emulated = o.judge(o.exact()), "" if why_not(device, "sla") is None else LOW_BIT_IN_TORCH
    contenders = [
        Contender("SDPA", lambda: _sdpa(o), dense, FLOAT[o.dtype]),
        Contender("SDPA flash", lambda: _sdpa(o, "FLASH_ATTENTION"), dense, FLOAT[o.dtype]),
        Contender("SDPA cuDNN", lambda: _sdpa(o, "CUDNN_ATTENTION"), dense, FLOAT[o.dtype]),
        Contender("int8, sageattention", lambda: _sage(o), dense, OTHER_LOW_BIT),
        Contender("int8, comfy_kitchen.int8_attention", lambda: _kitchen_int8(o), dense, OTHER_LOW_BIT),
        Contender("int8, turbo-core", lambda: _ours(o, "int8", False, 1.0), dense, LOW_BIT, note=emulated),
    ]
    shape = {"b": b, "h": h, "l": length, "keys": TEXT, "d": d}
    title = f"cross-attention {b} x {h} x {length} x {d} over {TEXT} keys"
    baselines = "SDPA cuDNN", "SDPA flash", "SDPA"
    return Case(title, shape, contenders, baselines, flop=4.0 * b * h * length * TEXT * d)


def cases(device, sizes=None, quick=False):
    """Yield the function that makes each case."""
    for size in sizes or shapes(device, quick):
        yield lambda size=size: attention_case(device, *size, quick)
        yield lambda size=size: cross_case(device, *size, quick)
