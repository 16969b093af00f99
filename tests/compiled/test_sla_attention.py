"""The attention kernel compiles for every card, without spills, to the instructions meant."""

import re

import pytest
import triton

from tests.helpers import aot, machine_code, sass
from tests.helpers.shipped import attention

QK = {80: "IMMA", 86: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "IMMA", 120: "IMMA"}
PV = {80: "HMMA", 86: "HMMA", 89: "QMMA", 90: "QGMMA", 100: "QMMA", 120: "QMMA"}
HALF = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "HMMA", 120: "HMMA"}


def check(capability, made, *wanted):
    for launch in made:
        compiled = sass.compile_launch(capability, *launch)
    names = aot.matrix_instructions(compiled)
    for name in wanted:
        assert any(name in found for found in names), names
    check_that_loads_run_ahead(compiled)
    return compiled


def check_that_loads_run_ahead(compiled):
    """A block of keys is multiplied while the next one is on its way: two buffers, and no wait for all loads."""
    held = sass.buffers(compiled)
    assert min(held["k"], held["v"]) >= 2, held
    assert sass.waits(compiled) and min(sass.waits(compiled)) > 0, sass.waits(compiled)


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
    assert not machine_code.differences("attention SageSLA, int8 out", capability, compiled)
    if capability in (89, 120):
        # probabilities stay in their thread: the only shuffles of a step are those of maximum and sum, two rows each
        assert len(re.findall(r"\tSHFL", products(compiled))) <= 8
        assert "PRMT" not in products(compiled)
        # 13 bits do not hold the sum over all keys: the products of a block start at zero, not at the sum so far
        ttgir = compiled.asm["ttgir"]
        start = re.search(r"tt\.dot %acc\w*, %\w+, (%cst\w*),", ttgir)[1]
        assert f"{start} = arith.constant dense<0.000000e+00>" in ttgir


@pytest.mark.parametrize("capability", aot.SHARED_MEMORY)
def test_sagesla_in_the_host(capability):
    made = attention("int8", raw=False, capability=capability)
    check(capability, made, QK[capability], PV[capability])


@pytest.mark.parametrize("capability", aot.SHARED_MEMORY)
def test_sla_in_the_fused_block(capability):
    made = attention("bf16", raw=True, capability=capability, quantize=True)
    compiled = check(capability, made, HALF[capability])
    assert not machine_code.differences("attention SLA bf16, int8 out", capability, compiled)
    if capability not in (90, 100) and triton.__version__.startswith("3.9."):  # not by 3.6
        # keys come by wide loads: those of single values, which the rotation of q once brought, are 4 times as many
        assert compiled.asm["sass"].count("LDS.U16") == 0


@pytest.mark.parametrize("precision, raw", [("int8", True), ("bf16", False)])
def test_heads_of_64(precision, raw):
    check(89, attention(precision, raw=raw, d=64), *((QK[89], PV[89]) if precision == "int8" else (HALF[89],)))


@pytest.mark.parametrize("capability", [86, 90, 120])
def test_whole_blocks_of_keys(capability):
    check(capability, attention("int8", raw=True, capability=capability, quantize=True, keys=75648))


@pytest.mark.parametrize("capability", [86, 90, 120])
@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_all_blocks(capability, precision):
    check(capability, attention(precision, raw=True, capability=capability, quantize=True, kept=None, keys=75648))


def test_without_the_linear_branch_two_programs_fit_a_multiprocessor_by_their_memory():
    for launch in attention("int8", raw=False, linear=False):
        assert sass.compile_launch(120, *launch).metadata.shared <= aot.SHARED_MEMORY[120] // 2
