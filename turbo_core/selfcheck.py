"""The kernels of this device held to their torch references, once, before anything is computed with them.

prove(device) is called when a model is loaded or kernels are brought to one; its verdicts stand in turbo_core.dispatch.
On a card it launches what a Wan block launches with bfloat16 activations, one video at a time, and one of each other
form. That is 42 kernels to compile: quantize 3, norm 9, int8_mm 12, sla 15, vae 3 (counted by a test), which somebody
waits for, once per Triton version. Through the interpreter: every form at a small ragged size. The reference computes
on the CPU: there its integer products are exact and nothing depends on what the card's libraries round. Rounding is
allowed, a wrong block, row or value is not. What no proof can survive is a kernel that reads or writes where it must
not: CUDA then refuses everything else in this process.
"""

import logging

import torch

from . import dispatch
from .channels import reference as channels_reference
from .devices import is_out_of_memory
from .dispatch import FAMILIES, SWITCH
from .errors import TurboError
from .int8 import dequantize_block
from .int8 import reference as int8_reference
from .sla import reference as sla_reference

BF16, FP16 = HALVES = (torch.bfloat16, torch.float16)
# norm of the difference to that of the reference's result
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-4}
SPARSE = {"bf16": 2e-2, "int8": 6e-2}  # scores and probabilities are rounded at other places
CHANGED = 0.01  # share of int8 values that may be the neighbour of the reference's
STATS = (1e-3, 1e-2)  # of a span's deviation, of its sum of squares: one bfloat16 rounded the other way is a tenth
WORST = 10  # so much more is allowed in a single row: one bad row must not hide behind many good ones


def _difference(ours, theirs, tolerance):
    """What is wrong with a result, in a few words, or None."""
    if isinstance(theirs, (tuple, list)):
        return next(filter(None, (_difference(a, b, tolerance) for a, b in zip(ours, theirs, strict=True))), None)
    if theirs is None:
        return None if ours is None else "a result too many"
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{ours.dtype} {list(ours.shape)} in place of {theirs.dtype} {list(theirs.shape)}"
    if theirs.dtype == torch.float32 and theirs.ndim == 3 and theirs.shape[-1] == 2:
        return _stats_difference(ours.double(), theirs.double())
    rows = theirs.double().view(-1, theirs.shape[-1])
    away = (ours.double().view(rows.shape) - rows).abs()
    if theirs.dtype == torch.int8:
        worst, changed = away.max().item(), (away != 0).double()
        share, most = changed.mean().item(), changed.mean(1).max().item()
        good = worst <= 1 and share <= CHANGED and most <= WORST * CHANGED
        return None if good else f"{share:.1%} of the int8 values differ, {most:.1%} of a row, by up to {worst:.0f}"
    tolerance = tolerance or TOLERANCE[theirs.dtype]
    error = (away.norm() / rows.norm()).item()
    largest = rows.abs().amax(1)
    worst = (away.amax(1) / largest.clamp_min(1e-4 * largest.max())).max().item()  # a row may be zeros
    good = error <= tolerance and worst <= WORST * tolerance  # comparisons with NaN are false
    return None if good else f"relative error {error:.1e}, {worst:.1e} in the worst row"


def _stats_difference(ours, theirs):
    """The same for row statistics [spans, M, 2]; means by each span's deviation, beside which they may be nothing."""
    (mean, m2), (mean_there, m2_there) = ours.unbind(-1), theirs.unbind(-1)
    tiny = 1e-6 * (theirs[..., 0].square() + m2_there).max()  # a span may be constant
    deviation = (m2_there / 128 + tiny).sqrt()
    means = ((mean - mean_there).abs() / deviation).max().item()
    squares = ((m2 - m2_there).abs() / (m2_there + tiny)).max().item()
    if means <= STATS[0] and squares <= STATS[1]:
        return None
    return f"means wrong by {means:.1e} of a deviation, sums of squares by {squares:.1e}"


def prove(device, families=FAMILIES) -> dict[str, str | None]:
    """Hold the kernels to their references on a device, those that have no verdict yet; cheap when all have one.

    Returns {family: None where its kernels compute there from now on, else why not, in a few words}. A card without
    the memory to try them is tried again by the next call; with TURBOWAN_KERNELS=triton nothing is tried. Raises
    TurboError where a kernel broke the connection to the card.
    """
    device = dispatch.whole_name(device)
    if dispatch.asked_for():
        dispatch.trust(device)
    elif dispatch.cannot_run(device) is None:
        for family in families:
            if not dispatch.is_decided(device, family) or dispatch.why_not(device, family) == _NO_MEMORY:
                _prove(device, family)
    return {family: dispatch.why_not(device, family) for family in families}


def was_full(device) -> bool:
    """True where a card had no memory for a proof, which the next call of prove tries again."""
    return any(dispatch.why_not(device, family) == _NO_MEMORY for family in FAMILIES)


_NO_MEMORY = "the card has no memory left to try them"
_told = set()


def _prove(device, family):
    if "first" not in _told:
        _told.add("first")
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else device
        once = "once per Triton version; this takes a while the first time"
        logging.info("TurboWan: compiling and testing kernels for %s, %s.", card, once)
    reason = _reason_against(device, family)
    dispatch.record(device, family, reason)
    if reason and (device, family) not in _told:
        _told.add((device, family))
        logging.warning(
            "TurboWan: %s kernels are not used on %s: %s. PyTorch computes instead, slower.", family, device, reason
        )


def _reason_against(device, family):
    try:
        with torch.no_grad():
            return CHECKS[family](device)
    except Exception as error:  # whatever a compiler or driver raises: the torch path is always there
        if is_out_of_memory(error):
            return _NO_MEMORY
        if not answers(device):
            raise TurboError(
                f"A {family} kernel broke the connection to {device}, and nothing runs there until a restart. "
                f"Restart with the environment variable {SWITCH}=torch, and report this with your card and driver."
            ) from error
        first_line = (str(error).splitlines() or [""])[0]
        return f"the kernel failed ({type(error).__name__}: {first_line})"


def answers(device) -> bool:
    """False once an illegal access has made CUDA refuse this process; a full card answers."""
    try:
        return torch.ones(1, device=device).item() == 1
    except RuntimeError as error:
        return is_out_of_memory(error)


def _moved(operands, device):
    """The same operands with every tensor on the device; tuples and lists of them too."""
    if isinstance(operands, torch.Tensor):
        return operands.to(device)
    if isinstance(operands, (tuple, list)):
        return type(operands)(_moved(x, device) for x in operands)
    return operands


def _first_difference(device, fast, reference, cases):
    """What is wrong with the first operation of fast that is not what reference computes, or None.

    cases: (name, operands, named operands, tolerance or None for that of the dtype), operands on the CPU.
    """
    for name, operands, named, tolerance in cases:
        named_there = {key: _moved(x, device) for key, x in named.items()}
        ours = _moved(getattr(fast, name)(*_moved(operands, device), **named_there), "cpu")
        theirs = getattr(reference, name)(*operands, **named)
        if name.endswith("_quantized"):  # a value that rounding moves takes the scale of its block along
            ours, theirs = dequantize_block(*ours), dequantize_block(*theirs)
        reason = _difference(ours, theirs, tolerance)
        if reason:
            return f"{name} is not what PyTorch computes: {reason}"
    return None


def _draw(*shape, dtype=torch.float32, seed=0):
    """Normal values; a matrix has a row of zeros, a row of large ones and a row with a far mean."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if x.ndim == 2 and len(x) > 4:
        x[1], x[2], x[3] = 0, 30 * x[2], x[3] + 5
    return x.to(dtype)


def _all_or(device, forms, on_card):
    """Operands of every form through the interpreter; on a card of those that are named there."""
    return list(forms.values()) if device.type == "cpu" else [forms[name] for name in on_card]


def quantize(device):
    """quantize_block and quantize_rows."""
    from .int8 import fast

    cases = []
    both = ("block", "rows")
    sizes = [(BF16, 300, 5120, both), (BF16, 300, 1536, ("rows",))]  # rows are cut by their width, blocks are not
    if device.type == "cpu":
        sizes = [(dtype, 134, 200, both) for dtype in HALVES]
    for dtype, rows, columns, on_card in sizes:
        x = _draw(rows, columns, dtype=dtype)
        forms = {"block": ("quantize_block", (x,), {}, None), "rows": ("quantize_rows", (x,), {}, None)}
        cases += _all_or(device, forms, on_card)
    return _first_difference(device, fast, int8_reference, cases)


def norm(device):
    """row_stats, rms_norm, layer_norm_quantize in both formats and forms."""
    from .int8 import fast

    cases = []
    for dtype, rows, columns, on_card in (
        [(dtype, 134, 200, None) for dtype in HALVES]
        if device.type == "cpu"
        else [
            (BF16, 300, 5120, ("stats", "rms", "affine", "first", "modulated", "groups", "modulated rows", "wide rms")),
            (BF16, 300, 1536, ("affine rows", "wide affine", "wide affine rows")),
            (FP16, 300, 5008, ("affine",)),  # ragged
        ]
    ):
        x = _draw(rows, columns, dtype=dtype)
        cases += _all_or(device, _norm_forms(x), on_card)
    return _first_difference(device, fast, int8_reference, cases)


def _norm_forms(x):
    weight, bias = (1 + 0.1 * _draw(2, x.shape[1], seed=1)).to(x.dtype)
    affine = {"weight": weight, "bias": bias}
    shift, scale = 0.5 * _draw(2, 2, x.shape[1], seed=2)
    groups = {"shift": shift, "scale": scale}  # a batch, or timesteps per frame
    modulated = {name: t[:1] for name, t in groups.items()}  # a video: one row for all tokens
    stats = {"stats": int8_reference.row_stats(x)}
    cases = {"stats": ("row_stats", (x,), {}, None), "rms": ("rms_norm", (x, weight, 1e-6), {}, None)}
    for name, given in (
        ("first", modulated),
        ("affine", affine | stats),
        ("modulated", modulated | stats),
        ("groups", groups | stats),
        ("affine rows", affine | {"rows": True}),
        ("modulated rows", modulated | {"rows": True}),
        ("groups rows", groups | {"rows": True}),
    ):
        cases[name] = ("layer_norm_quantize", (x, 1e-6), given, None)
    # without ComfyUI the weights of norms are float32 beside activations of a half
    wide = {name: t.float() for name, t in affine.items()}
    cases["wide rms"] = ("rms_norm", (x, weight.float(), 1e-6), {}, None)
    for name, given in (("wide affine", wide | stats), ("wide affine rows", wide | {"rows": True})):
        cases[name] = ("layer_norm_quantize", (x, 1e-6), given, None)
    return cases


def int8_mm(device):
    """Every form of the product, in both formats."""
    from .int8 import fast

    block, row = int8_reference.quantize_block, int8_reference.quantize_rows
    large = (1402, 2176, 384)  # more tiles than any card has processors
    cases = []
    for quantized, (m, n, k), on_card in (
        [(quantized, (134, 136, 200), None) for quantized in (block, row)]
        if device.type == "cpu"
        else [
            (block, large, ("qkv", "self o", "cross q", "cross o", "up", "groups")),
            (row, large, ("qkv", "self o", "up")),  # the rest differs where the formats do not
            (block, (134, *large[1:]), ("cross q",)),  # k and v of a text: other launch parameters
            (row, (134, *large[1:]), ("cross q",)),
            (block, (134, 136, 208), ("half",)),  # ragged
        ]
    ):
        x = quantized(_draw(m, k))
        weights = [quantized(_draw(n, k, seed=seed) / k**0.5) for seed in (1, 2, 3)]
        cases += _all_or(device, _int8_mm_forms(x, weights, quantized is block), on_card)
    return _first_difference(device, fast, int8_reference, cases)


def _int8_mm_forms(x, weights, block):
    """By the linears of turbo_core.wan.fused that launch them."""
    m, n = len(x[0]), len(weights[0][0])
    biases = [_draw(1, n, dtype=BF16, seed=seed)[0] for seed in (4, 5, 6)]
    residual, gates = _draw(m, n, dtype=BF16, seed=7), _draw(2, n, seed=8)
    gate, stats = gates[:1], {"stats": block}  # as the norms of the format want them
    layer = (*x, *weights[0], biases[0])
    return {
        "qkv": ("int8_mm_qkv", (*x, *map(list, zip(*weights)), biases), {}, None),
        "self o": ("int8_mm_residual", (*layer, residual, gate), stats, None),
        "cross q": ("int8_mm", layer, {}, None),
        "cross o": ("int8_mm_residual", (*layer, residual), stats, None),
        "up": ("int8_mm_quantize", layer, {}, None) if block else ("int8_mm", layer, {"gelu": True}, None),
        "groups": ("int8_mm_residual", (*layer, residual, gates), stats, None),
        "half": ("int8_mm", layer, {"out_dtype": FP16}, None),
    }


def sla(device):
    """Block means, block map, preparation and attention in both precisions, with norms and rotation and without."""
    from .sla import fast

    on_cpu = device.type == "cpu"
    # On a card so many heads and blocks that a program prepares several blocks of keys, as it does for a video. The
    # best 7 of 18 blocks, and the best 1 of 3, score far above the rest.
    topk = 0.4
    heads, lengths = (2, (150, 90)) if on_cpu else (40, (1100, 450))
    cases = []
    qkv, raw, proj = _attention_inputs(BF16, heads, 128, 1, lengths[0])
    for precision in ("bf16", "int8"):
        given, tolerance = (qkv, *raw, *proj), SPARSE[precision]
        forms = {
            "fused": ("sla_from_qkv_quantized", (*given, topk, None, precision), {}, tolerance),
            "floats": ("sla_from_qkv", (*given, topk, None, precision), {}, tolerance),
            "dense": ("sla_from_qkv", (*given, 1.0, None, precision), {}, tolerance),
        }
        cases += _all_or(device, forms, ("fused",))
    head_dim = 64 if on_cpu else 128  # no published model has heads of 64
    qkv, raw, proj = _attention_inputs(FP16, heads, head_dim, 2, lengths[1])
    for precision in ("bf16", "int8") if on_cpu else ("int8",):
        tolerance, untrained = SPARSE[precision], (*qkv, None, None, topk)
        blocks = (128, 64, precision)
        forms = {
            "raw": ("sla_from_qkv", (qkv, *raw, *proj, topk, None, precision), {}, tolerance),
            "plain": ("sparse_linear_attention", (*untrained, None, *blocks), {}, tolerance),
            "cover": ("sparse_linear_attention", (*untrained, 0.6, *blocks), {}, tolerance),
        }
        cases += _all_or(device, forms, ("cover",))
    return _first_difference(device, fast, sla_reference, cases)


def _attention_inputs(dtype, heads, head_dim, batch, length):
    """q, k, v whose key blocks score far apart, so that rounding cannot choose other ones; norms and turns; proj_l."""
    qkv = _draw(3, batch, length, heads, head_dim)
    qkv[0] += 1.0
    qkv[1] += 0.4 * (torch.arange(length) // 64 * 5 % 7)[:, None, None]  # the best blocks are not the first
    qkv = qkv.to(dtype)
    sums = qkv[:2].float().square().sum((-1, -2)).view(2, 1, -1)
    weights = 1 + 0.1 * _draw(2, heads * head_dim, seed=1)
    angles = 0.3 * _draw(length, head_dim // 2, seed=2)  # small turns keep the order of the blocks
    proj = _draw(head_dim, head_dim, seed=3) / head_dim**0.5, _draw(1, head_dim, seed=4)[0]
    return qkv, (sums, *weights, 1e-6, angles.cos(), angles.sin()), proj


def vae(device):
    """norm_silu at the widths of the published VAE."""
    from .channels import fast

    cases = []
    for dtype, rows, columns in [(dtype, 134, 200) for dtype in HALVES] if device.type == "cpu" else VAE_ON_CARD:
        x, gamma = _draw(rows, columns, dtype=dtype), (1 + 0.1 * _draw(1, columns, seed=1)[0]).to(dtype)
        cases.append(("norm_silu", (x, gamma), {}, None))
    return _first_difference(device, fast, channels_reference, cases)


VAE_ON_CARD = [(BF16, 300, columns) for columns in (96, 192, 384)]
CHECKS = {"quantize": quantize, "norm": norm, "int8_mm": int8_mm, "sla": sla, "vae": vae}
