"""Compile Triton kernels for cards that are not there: no GPU, no CUDA, only the triton wheel.

It says that a launch compiles, with which instructions and how much shared memory, not that it is right or fast.
Never use it in a process with TRITON_INTERPRET=1.
"""

import re
from collections import Counter

import triton

from turbo_core.diagnostics.compiling import CompileOnly

# compute capability -> shared memory a block may use, in bytes; the compiler itself does not check
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
# those whose code differs where a kernel has no fp8: sm_86 gets what sm_89 gets, and has its memory
CARDS = (80, 89, 90, 100, 120)

_MATRIX = re.compile(r"\s((?:UTC)?[A-Z]{0,2}MMA[A-Z0-9_.]*)\b")
_SPILL = re.compile(r"\s((?:STL|LDL)(?:\.\S*)?)\s")


def compile_for(capability: int | str, kernel, *args, **options):
    """Compile the launch kernel[grid](*args, **options) for one compute capability, e.g. 89, or one AMD chip.

    args: as in the launch, CPU tensors for pointers: their alignment and the values of integers specialize the kernel
    as they would on the card. Returns triton's compiled kernel. Raises what the compiler raises.
    """
    if isinstance(capability, str):
        target = "hip", capability, 64 if capability.startswith("gfx9") else 32
    else:
        target = "cuda", capability
    triton.runtime.driver.set_active(CompileOnly(*target))
    return kernel.warmup(*args, grid=(1,), **options)


def matrix_instructions(compiled) -> Counter:
    """Tensor-core instructions of a compiled kernel by name, e.g. {"HMMA.16816.F32.BF16": 64}."""
    return Counter(_MATRIX.findall(compiled.asm["sass"]))


def spills(compiled) -> int:
    """Loads and stores of local memory: above zero, registers did not suffice."""
    return len(_SPILL.findall(compiled.asm["sass"]))


def fits(capability: int, compiled) -> bool:
    """Whether a block's shared memory fits the card."""
    return compiled.metadata.shared <= SHARED_MEMORY[capability]
