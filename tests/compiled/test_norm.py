"""Norm kernels compile for every card, without spills, in wide loads and stores."""

import pytest
import torch

from tests.helpers import aot, sass
from turbo_core.kernels import norm

X = torch.empty(256, 5120, dtype=torch.bfloat16)
VECTOR, GROUPS = torch.empty(5120), torch.empty(2, 5120)
FORMS = {
    "modulated": {"shift": VECTOR[None], "scale": VECTOR[None]},
    "affine": {"weight": VECTOR, "bias": VECTOR},
    "grouped": {"shift": GROUPS, "scale": GROUPS},
}


def check_block(capability, form, registers):
    made = sass.launches(norm.layer_norm_quantize, X, 1e-6, **FORMS[form], stats=torch.empty(40, 256, 2))
    assert [kernel.__name__ for kernel, *_ in made] == ["merge_stats_kernel", "layer_norm_block_kernel"]
    compiled = sass.compile_launch(capability, *made[-1])
    assert sass.registers(compiled) <= registers
    found = sass.memory(compiled)
    # 64 values a thread, 16 bytes at a time: 8 loads of x and 4 of each vector; narrow: statistics, the scale
    assert found["LDG 128"] == 16 and found["STG 128"] == 4 and found["STG 32"] == 1, found
    assert set(found) <= {"LDG 128", "LDG 64", "LDG 32", "STG 128", "STG 32"}, found


@pytest.mark.parametrize("capability", aot.CARDS)
def test_blocks(capability):
    check_block(capability, "modulated", registers=128)  # two programs of 8 warps on a multiprocessor


@pytest.mark.parametrize("form, capability", [("affine", 90), ("grouped", 80), ("grouped", 120)])
def test_other_forms(form, capability):
    check_block(capability, form, registers=168)


@pytest.mark.parametrize("capability", aot.CARDS)
def test_statistics(capability):
    statistics, merge, _ = sass.launches(norm.layer_norm_quantize, X, 1e-6)
    found = sass.memory(sass.compile_launch(capability, *statistics))
    assert found["LDG 128"] == 8 and sum(found.values()) == 9, found
    found = sass.memory(sass.compile_launch(capability, *merge))
    assert found == {"LDG 64": 16, "STG 32": 1}, found  # mean and squares at once


@pytest.mark.parametrize("k, capability", [(1536, 90), *((5120, capability) for capability in aot.CARDS)])
def test_rows(k, capability):
    x, vector = X[:, :k].contiguous(), VECTOR[None, :k]
    [launch] = sass.launches(norm.layer_norm_quantize, x, 1e-6, shift=vector, scale=vector, rows=True)
    compiled = sass.compile_launch(capability, *launch)
    assert sass.registers(compiled) <= 176  # five programs of 2 warps, 50 KB of x under way
    found = sass.memory(compiled)
    assert set(found) == {"LDG 128", "STG 128", "STG 32"} and found["STG 32"] == 1, found  # narrow: the scale


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_rms_norm(capability):
    [launch] = sass.launches(norm.rms_norm, X, VECTOR, 1e-6)
    assert set(sass.memory(sass.compile_launch(capability, *launch))) == {"LDG 128", "STG 128"}
