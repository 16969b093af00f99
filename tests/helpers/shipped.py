"""What a block of the 14B model launches at 720p, of operands that take no memory, for cards that are not there."""

from unittest.mock import patch

import torch
from turbo_core.kernels.block_map import block_map
from turbo_core.kernels.int8_mm import prepare
from turbo_core.kernels.norm import layer_norm_quantize, rms_norm
from turbo_core.kernels.norm_silu import norm_silu
from turbo_core.kernels.quantize import quantize_block, quantize_rows

from turbo_core.kernels import int8_configs, sla_attention, sla_pool, sla_prepare

from . import sass

LENGTH, HEADS, KEPT = 75600, 40, 118  # 14B at 720p, top-k 0.1
KINDS = {80: "sm_80", 86: "sm_86", 89: "sm_86", 90: "sm_90", 100: "sm_100", 120: "sm_120"}
SIZES = {"plain": (5120, 5120), "quantize": (13824, 5120), "residual": (5120, 13824), "qkv": (5120, 5120)}  # N, K
FORMS = int8_configs.FORMS
BF16 = torch.bfloat16


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def raw_form(d=128):
    tables = {name: empty(LENGTH, d // 2) for name in ("cos", "sin")}
    return {"sums": empty(2, 1, LENGTH), "q_weight": empty(HEADS * d), **tables}


def attention(precision, raw, capability=89, quantize=False, linear=True, d=128, keys=LENGTH, kept=KEPT):
    """(kernel, arguments, options) of each launch of sparse-linear attention."""
    half = torch.bfloat16
    q = empty(3, 1, LENGTH, HEADS, d, dtype=half)[0] if raw else empty(1, LENGTH, HEADS, d, dtype=half)
    k = v = empty(1, keys, HEADS, d, dtype=half).transpose(1, 2)
    given = raw_form(d) if raw else {}
    blocks = -(-keys // 64)
    if precision == "int8":
        fp8 = capability >= 89
        k = empty(1, HEADS, keys, d, dtype=torch.int8)
        v = empty(1, HEADS, keys, d, dtype=torch.float16)
        v = empty(1, HEADS, d, blocks * 64, dtype=torch.float8_e4m3fn) if fp8 else v
        given |= {"k_scale": empty(1, HEADS, blocks), "v_scale": empty(1, HEADS, d)}
    elif raw:
        k = empty(1, HEADS, keys, d, dtype=half)
    if linear:
        given |= {"kv_proj": empty(1, HEADS, d, d), "k_sum": empty(1, HEADS, d), "proj_bias": empty(d)}
    index = None if kept is None else empty(1, HEADS, -(-LENGTH // 128), kept, dtype=torch.int32)
    return sass.launches(sla_attention.attention, q, k, v, index, quantize=quantize, **given)


def product(capability, name, m, gates=1, config=None):
    """(kernel, arguments, options) of one of int8_configs.FORMS; m rows, of which 32760 does not divide by 16."""
    fmt, form = name.split()
    n, k = SIZES[form]

    def real(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype)  # has an address, and is never touched: no memory is taken

    def operand(rows):
        scale = (rows, 1) if fmt == "row" else (-(-rows // 128), k // 128)
        return real(rows, k, dtype=torch.int8), real(*scale)

    weights, scales = zip(*(operand(n) for _ in range(3 if form == "qkv" else 1)))
    y = real(*((3, m, n) if form == "qkv" else (m, n)), dtype=torch.int8 if form == "quantize" else BF16)
    extra = {
        "plain": {},
        "quantize": {"y_scale": real(-(-m // 128), n // 128)},
        "residual": {
            "residual": real(m, n, dtype=BF16),
            "gate": real(gates, n),
            "stats": real(n // 128, m, 2) if fmt == "block" else None,  # the row format's norms do without
        },
        "qkv": {"squares": real(2, n // 128, m)},
    }[form]
    biases = [real(n, dtype=BF16) for _ in weights]
    gelu, card = form == "quantize", KINDS[capability]
    kernel, _, *rest = prepare(form, *operand(m), weights, scales, biases, y, gelu, config, card, **extra)
    return kernel, *rest


def config(capability, name):
    """The launch row of one of FORMS for a long video."""
    return int8_configs.shipped(name, LENGTH, KINDS[capability])


def streaming(capability) -> dict:
    """{name of a kernel: (kernel, arguments, options)} of the passes between the products."""
    q, k, v = (empty(1, LENGTH, HEADS, 128, dtype=BF16) for _ in range(3))
    raw = {"sums": empty(2, 1, LENGTH), "cos": empty(LENGTH, 64), "sin": empty(LENGTH, 64)}
    weight, x = empty(HEADS * 128), empty(LENGTH, HEADS * 128, dtype=BF16)
    mean, means = empty(1, HEADS, 128), empty(1, HEADS, -(-LENGTH // 128), 128)
    turn = {"shift": empty(1, HEADS * 128), "scale": empty(1, HEADS * 128)}
    with patch.object(sla_prepare, "processors", lambda device: 132):
        made = [
            *sass.launches(sla_pool.pool_means, q, k, v, q_weight=weight, k_weight=weight, **raw),
            *sass.launches(sla_prepare.prepare, k, v, mean, mean, fp8=capability >= 89, k_weight=weight, **raw),
            *sass.launches(quantize_block, x),
            *sass.launches(quantize_rows, x),
            *sass.launches(layer_norm_quantize, x, 1e-6, stats=empty(40, LENGTH, 2), **turn),
            *sass.launches(layer_norm_quantize, x, 1e-6, **turn),  # the first block's, which makes its statistics
            *sass.launches(layer_norm_quantize, x, 1e-6, rows=True, **turn),
            *sass.launches(rms_norm, x, weight, 1e-6),
            *sass.launches(norm_silu, empty(LENGTH, 96, dtype=BF16), empty(96, dtype=BF16)),  # the VAE's widest frames
            *sass.launches(block_map, means, empty(1, HEADS, -(-LENGTH // 64), 128), KEPT, mean),
        ]
    return {launch[0].__name__: launch for launch in made}
