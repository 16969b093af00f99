"""The int8 products compile for every card, without spills, to its int8 instructions.

At the shapes of the 14B model, whose sizes divide by 128 and specialize the kernel; 32760 rows do not divide by 16.
"""

import pytest
import triton

from tests.helpers import aot, machine_code
from tests.helpers.shipped import product
from turbo_core.kernels import int8_configs

# up to the first dot: IMMA is the end of UTCIMMA too
INSTRUCTION = {80: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "UTCIMMA", 120: "IMMA"}
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))


def compiled(capability, name, m, gates=1, config=None):
    kernel, arguments, options = product(capability, name, m, gates, config)
    return aot.compile_for(capability, kernel, *arguments, **options)


def check(capability, kernel):
    names = {name.partition(".")[0] for name in aot.matrix_instructions(kernel)}
    if capability != 100 or TRITON >= (3, 8):  # before, int8 has no tcgen05 instruction there
        assert INSTRUCTION[capability] in names, names
    assert aot.fits(capability, kernel)
    assert aot.spills(kernel) == 0


@pytest.mark.parametrize("name", int8_configs.FORMS)
@pytest.mark.parametrize("capability", aot.CARDS)
def test_every_form_compiles_with_the_launch_of_the_table(capability, name):
    kernel = compiled(capability, name, 32760)
    check(capability, kernel)
    assert not machine_code.differences(name, capability, kernel)


# 89 has the least shared memory of its row; of the others one form of each format
FEW_ROWS = [(card, name) for card in (89, 90) for name in int8_configs.FORMS if name != "block quantize"]
FEW_ROWS += [(card, name) for card in (80, 100, 120) for name in ("block plain", "row qkv")]


@pytest.mark.parametrize("capability, name", FEW_ROWS)
def test_few_rows(capability, name):
    kernel = compiled(capability, name, machine_code.SHORT)
    check(capability, kernel)
    assert not machine_code.differences(f"{name}, {machine_code.SHORT} rows", capability, kernel)


@pytest.mark.parametrize("name", ["block residual", "row residual"])
@pytest.mark.parametrize("capability", aot.CARDS)
def test_a_gate_for_each_sample(capability, name):
    check(capability, compiled(capability, name, 2 * 32760, gates=2))


# warps of their own for loads and products: no register spills, and the compiler did take warps apart
# Triton 3.6 fails on some of these forms; only `turbo-core tune` tries them, which leaves out what fails
@pytest.mark.skipif(not triton.__version__.startswith("3.9."), reason="checked with the Triton that is pinned")
@pytest.mark.parametrize("name", ["block plain", "block residual", "row qkv"])
def test_warp_specialization_compiles(name):
    kernel = compiled(90, name, 32760, config=int8_configs.DEFAULT._replace(variant="specialized", warps=4))
    check(90, kernel)
    assert "UTMALDG" in kernel.asm["sass"]
    assert "ttg.warp_specialize" in kernel.asm["ttgir"]


@pytest.mark.parametrize("name", ["block plain", "row plain"])
@pytest.mark.parametrize("capability", [90, 100, 120])
def test_the_persistent_variant_compiles(capability, name):
    kernel = compiled(capability, name, 32760, config=int8_configs.DEFAULT._replace(variant="persistent"))
    check(capability, kernel)
    assert "UTMALDG" in kernel.asm["sass"]


def test_the_length_is_a_runtime_argument():
    # 75600 divides by 16, 32760 does not, 1 is special to Triton: one kernel for all
    kernels = [compiled(90, "block plain", m, config=int8_configs.DEFAULT) for m in (75600, 32760, 1)]
    assert len({kernel.hash for kernel in kernels}) == 1


@pytest.mark.parametrize("capability", [80, 89])
def test_two_dots_of_half_the_depth_keep_operands_as_they_are_loaded(capability):
    # one dot of 128 makes the compiler repack the bytes of every operand, in more instructions than there are products
    sass = compiled(capability, "block plain", 32760).asm["sass"]
    assert sass.count("PRMT") < sass.count("IMMA")
