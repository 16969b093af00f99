"""What a kernel's wrapper would launch, compiled for a card that is not there, and its memory instructions."""

import re
from collections import Counter
from unittest.mock import patch

import torch
from triton.runtime.jit import JITFunction

from tests.helpers import aot

_OPCODE = re.compile(r"^[^\t\n]*\t(?:@!?U?P\w+\s+)?((?:LDG|STG)[A-Z0-9_.]*)", re.M)
_PRODUCT = re.compile(r"= tt\.dot |warp_group_dot |tc_gen5_mma")
_BUFFERS = re.compile(r"%(\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x\d+x\d+x\w+,")
_WAIT = re.compile(r"ttg\.async_wait .*\{num = (\d+)")


def launches(wrapper, *args, **kwargs):
    """(kernel, arguments, options) of every launch that the call would make.

    args may be meta tensors, with the strides of a real video and no memory; the compiler is given small ones.
    """
    made = []

    def note(kernel, *given, grid, warmup, **options):
        held = [torch.empty(16, dtype=x.dtype) if isinstance(x, torch.Tensor) and x.is_meta else x for x in given]
        made.append((kernel, held, options))

    with patch.object(JITFunction, "run", note):
        wrapper(*args, **kwargs)
    return made


def compile_launch(capability, kernel, args, options):
    """The compiled kernel; fails where it spills or where its shared memory does not fit the card."""
    compiled = aot.compile_for(capability, kernel, *args, **options)
    assert aot.spills(compiled) == 0, kernel
    assert aot.fits(capability, compiled), (kernel, compiled.metadata.shared)
    return compiled


def registers(compiled) -> int:
    """Registers of a thread, by the highest that is named."""
    return 1 + max(map(int, re.findall(r"\bR(\d+)\b", compiled.asm["sass"])))


def memory(compiled) -> Counter:
    """Loads and stores of global memory by width in bits, e.g. {"LDG 128": 8, "STG 128": 4}."""
    widths = {".U8": 8, ".S8": 8, ".U16": 16, ".S16": 16, ".64": 64, ".128": 128, ".256": 256}
    found = Counter()
    for opcode in _OPCODE.findall(compiled.asm["sass"]):
        width = next((bits for suffix, bits in widths.items() if suffix in opcode), 32)
        found[f"{opcode[:3]} {width}"] += 1
    return found


def atomics(compiled) -> bool:
    """True where the kernel adds to memory that others add to, in an order that is nobody's."""
    return re.search(r"\b(RED|ATOM|ATOMG)\b", compiled.asm["sass"]) is not None


def main_loop(compiled) -> str:
    """The loop with the most matrix products, as the compiler's last form for all cards of a maker has it (TTGIR)."""
    lines, opened, loops = compiled.asm["ttgir"].splitlines(), [], []
    for number, line in enumerate(lines):
        depth = len(line) - len(line.lstrip())
        if "scf.for" in line:
            opened.append((depth, number))
        elif opened and line.lstrip().startswith("}") and depth == opened[-1][0]:
            loops.append("\n".join(lines[opened.pop()[1] : number]))
    # the innermost one of a nest is the shortest
    return max(loops, key=lambda loop: (len(_PRODUCT.findall(loop)), -len(loop)))


def buffers(compiled) -> dict[str, int]:
    """How many blocks of each operand shared memory holds at a time, by name: {"k": 2, "v": 2}."""
    found = _BUFFERS.findall(compiled.asm["ttgir"])
    return {name: int(count) for name, count in found}


def waits(compiled) -> list[int]:
    """How many loads may still be under way after each wait of the main loop; 0 is a wait for all of them."""
    return [int(count) for count in _WAIT.findall(main_loop(compiled))]
