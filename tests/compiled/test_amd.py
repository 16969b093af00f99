"""The kernels compile for AMD's chips, to their matrix instructions, and fit their memory. No chip has run them."""

import re

import pytest
import torch

from tests.helpers import aot, shipped
from turbo_core.kernels import int8_configs

MATRIX = {"gfx942": r"v_mfma_i32_\w+_i8", "gfx1100": r"v_wmma_i32_\w+_iu8"}
SHARED_MEMORY = 65536
SPILLS = re.compile(r"vgpr_spill_count:\s*(\d+)")


@pytest.fixture(autouse=True)
def an_amd_card(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(shipped, "KINDS", {80: "hip"})  # 80: what has no fp8


def compiled(chip, kernel, arguments, options):
    made = aot.compile_for(chip, kernel, *arguments, **options)
    assert made.metadata.shared <= SHARED_MEMORY, kernel
    return made.asm["amdgcn"]


def spills(code):
    return int(SPILLS.search(code)[1])


@pytest.mark.parametrize("name", int8_configs.FORMS)
def test_products(name):
    for chip, instruction in MATRIX.items():
        code = compiled(chip, *shipped.product(80, name, shipped.LENGTH))
        assert re.search(instruction, code) and spills(code) == 0


def test_attention():
    # on gfx942 alone: gfx1100 takes half a minute, and spills hundreds of registers
    for precision, instruction in (("int8", MATRIX["gfx942"]), ("bf16", r"v_mfma_f32_\w+bf16")):
        code = compiled("gfx942", *shipped.attention(precision, True, 80, quantize=True)[-1])
        assert re.search(instruction, code) and spills(code) == 0


@pytest.mark.parametrize("name", shipped.streaming(80))
def test_the_passes_between_the_products(name):
    for chip in MATRIX:
        compiled(chip, *shipped.streaming(80)[name])
