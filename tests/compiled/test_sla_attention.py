"""The attention kernel compiles for every card, without spills, to the instructions meant."""

import re

import pytest
import torch

from tests.helpers import aot, sass
from turbo_core.kernels import sla_attention

LENGTH, HEADS, KEPT = 75600, 40, 118  # 14B at 720p, top-k 0.1
QK = {80: "IMMA", 86: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "IMMA", 120: "IMMA"}
PV = {80: "HMMA", 86: "HMMA", 89: "QMMA", 90: "QGMMA", 100: "QMMA", 120: "QMMA"}
HALF = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "HMMA", 120: "HMMA"}


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def raw_form(d=128):
    tables = {name: empty(LENGTH, d // 2) for name in ("cos", "sin")}
    return {"sums": empty(2, 1, LENGTH), "q_weight": empty(HEADS * d), **tables}


def attention(precision, raw, capability=89, quantize=False, linear=True, d=128, keys=LENGTH):
    half = torch.bfloat16
    q = empty(3, 1, LENGTH, HEADS, d, dtype=half)[0] if raw else empty(1, LENGTH, HEADS, d, dtype=half)
    k = v = empty(1, LENGTH, HEADS, d, dtype=half).transpose(1, 2)
    given = raw_form(d) if raw else {}
    blocks = -(-keys // 64)
    if precision == "int8":
        fp8 = capability >= 89
        k = empty(1, HEADS, LENGTH, d, dtype=torch.int8)
        v = empty(1, HEADS, LENGTH, d, dtype=torch.float16)
        v = empty(1, HEADS, d, blocks * 64, dtype=torch.float8_e4m3fn) if fp8 else v
        given |= {"k_scale": empty(1, HEADS, blocks), "v_scale": empty(1, HEADS, d)}
    elif raw:
        k = empty(1, HEADS, LENGTH, d, dtype=half)
    if linear:
        given |= {"kv_proj": empty(1, HEADS, d, d), "k_sum": empty(1, HEADS, d), "proj_bias": empty(d)}
    index = empty(1, HEADS, -(-LENGTH // 128), KEPT, dtype=torch.int32)
    return sass.launches(sla_attention.attention, q, k, v, index, quantize=quantize, **given)


def check(capability, made, *wanted):
    for launch in made:
        compiled = sass.compile_launch(capability, *launch)
    names = aot.matrix_instructions(compiled)
    for name in wanted:
        assert any(name in found for found in names), names
    return compiled


def products(compiled):
    """The instructions of the loop over kept blocks, from its first product on."""
    lines = compiled.asm["sass"].splitlines()
    first = next(i for i, line in enumerate(lines) if "IMMA" in line)
    last = [i for i, line in enumerate(lines) if "QMMA" in line][31]  # 128 x 128 x 64 by 8 warps
    return "\n".join(lines[first : last + 1])


@pytest.mark.parametrize("capability", aot.SHARED_MEMORY)
def test_sagesla_in_the_fused_block(capability):
    made = attention("int8", raw=True, capability=capability, quantize=True)
    compiled = check(capability, made, QK[capability], PV[capability])
    if capability in (89, 120):
        # probabilities stay in their thread: the only shuffles of a step are those of maximum and sum, two rows each
        assert len(re.findall(r"\tSHFL", products(compiled))) <= 8
        assert "PRMT" not in products(compiled)
        # 13 bits do not hold the sum over all keys: the products of a block start at zero, not at the sum so far
        assert re.search(r"QMMA\S* .*, RZ;", products(compiled))


@pytest.mark.parametrize("capability", [86, 89, 100])
def test_sagesla_in_the_host(capability):
    made = attention("int8", raw=False, capability=capability)
    check(capability, made, QK[capability], PV[capability])


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_sla_in_the_fused_block(capability):
    made = attention("bf16", raw=True, capability=capability, quantize=True)
    compiled = check(capability, made, HALF[capability])
    if capability != 90:
        # keys come by wide loads: those of single values, which the rotation of q once brought, are 4 times as many
        assert compiled.asm["sass"].count("LDS.U16") == 0


def test_heads_of_64():
    check(89, attention("int8", raw=False, d=64), QK[89], PV[89])


def test_without_the_linear_branch_two_programs_fit_a_multiprocessor_by_their_memory():
    for launch in attention("int8", raw=False, linear=False):
        assert sass.compile_launch(120, *launch).metadata.shared <= aot.SHARED_MEMORY[120] // 2
