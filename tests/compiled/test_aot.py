"""What helpers/aot.py promises: kernels compile for cards that are not there, to that card's instructions."""

import pytest
import torch
import triton
import triton.language as tl

from tests.helpers import aot

# the card's own int8 instruction: warp-level up to Ada and again on consumer Blackwell
INT8 = {80: "IMMA", 86: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "IMMA", 120: "IMMA"}


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr):
    # one program owns one BLOCK x BLOCK tile of c
    at = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.int32)
    for k in range(0, K, BLOCK):
        a = tl.load(a_ptr + at[:, None] * K + k + at[None, :])
        b = tl.load(b_ptr + at[None, :] * K + k + at[:, None])
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)  # triton 3.6 does not take it from acc
    tl.store(c_ptr + at[:, None] * BLOCK + at[None, :], acc)


@pytest.mark.parametrize("capability", aot.SHARED_MEMORY)
def test_an_int8_dot_uses_the_tensor_cores(capability):
    a, b = torch.empty(2, 128, 1024, dtype=torch.int8)
    c = torch.empty(128, 128, dtype=torch.int32)
    compiled = aot.compile_for(capability, dot_kernel, a, b, c, 1024, BLOCK=128, num_warps=8)
    names = aot.matrix_instructions(compiled)
    assert any(INT8[capability] in name for name in names), names
    assert aot.fits(capability, compiled)
    assert aot.spills(compiled) == 0


def test_what_sm_86_gets_is_what_sm_89_gets():
    a, b = torch.empty(2, 128, 1024, dtype=torch.int8)
    c = torch.empty(128, 128, dtype=torch.int32)
    older, newer = (aot.compile_for(card, dot_kernel, a, b, c, 1024, BLOCK=128, num_warps=8) for card in (86, 89))
    assert aot.matrix_instructions(older) == aot.matrix_instructions(newer)
    assert older.metadata.shared == newer.metadata.shared and aot.SHARED_MEMORY[86] == aot.SHARED_MEMORY[89]
    assert len(older.asm["sass"].splitlines()) == len(newer.asm["sass"].splitlines())


def test_spills_are_seen():
    # 128 x 128 int32 accumulators in one warp: 512 registers a thread, of which there are 255
    a, b = torch.empty(2, 128, 1024, dtype=torch.int8)
    c = torch.empty(128, 128, dtype=torch.int32)
    compiled = aot.compile_for(80, dot_kernel, a, b, c, 1024, BLOCK=128, num_warps=1)
    assert aot.spills(compiled) > 0
