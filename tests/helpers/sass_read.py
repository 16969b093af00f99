"""The machine code of a kernel (SASS with its control codes) as instructions that know what they occupy, and how long.

Rates are of one of a multiprocessor's four partitions and from data sheets and published measurements; bytes of the L2
cache are estimates. Everything that follows from them is a forecast.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple


class Machine(NamedTuple):
    """A generation of cards. Products a cycle and partition; cycles that a partition is busy with one instruction."""

    int8: float
    fp8: float  # summed in float32
    fp8_half: float  # summed in fp16
    half: float  # bf16, or fp16 summed in float32
    half_half: float  # fp16 summed in fp16
    alu: float  # integers, logic, comparisons
    fma: float  # products and sums of float32
    shared: int  # bytes of a multiprocessor
    warps: int  # that it holds
    l2: float  # bytes a cycle and multiprocessor, estimated
    latency: int  # cycles of a product


MACHINES = {
    80: Machine(512, 0, 0, 256, 256, 2, 2, 164 << 10, 64, 40, 26),
    86: Machine(256, 0, 0, 64, 128, 2, 1, 100 << 10, 48, 18, 33),
    89: Machine(256, 128, 256, 64, 128, 2, 1, 100 << 10, 48, 17, 33),
    90: Machine(1024, 1024, 1024, 512, 512, 2, 1, 228 << 10, 64, 32, 33),
    100: Machine(2048, 2048, 2048, 1024, 1024, 2, 1, 228 << 10, 64, 32, 33),  # to find the loop: no cycles are told
    120: Machine(256, 128, 256, 64, 128, 1, 1, 100 << 10, 48, 17, 33),
}
WARP_LEVEL_ON_90 = 0.62  # of the rate, for products that are no wgmma

_LINE = re.compile(r"^(--|\d\d):(.):(.):.:(.)\t(?:(@!?U?P\w+)\s+)?([A-Z][A-Zx0-9_.]*)\s*(.*);")
_LABEL = re.compile(r"^(\w+):\s*$")
_WIDTHS = ((".256", 32), (".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1))
_PRODUCTS = {"16816": 2048, "16832": 4096, "1688": 1024, "16864": 8192, "8816": 1024}
_FMA = {"FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2"}
_FMA_TWO = {"FFMA2", "FADD2", "FMUL2"}
_SLOW = {"MUFU", "I2F", "F2I", "F2F", "FRND", "I2I", "POPC", "FLO"}
_TWO_CYCLES = {"FMNMX", "F2FP", "I2FP", "PRMT", "FSETP", "FSEL", "VIMNMX", "SEL"}
_OTHERS = {"LDC", "LDCU", "S2R", "S2UR", "R2UR", "ULDC"}
_CONTROL = re.compile(
    "BAR|DEPBAR|LDGDEPBAR|WARPGROUP|WARPSYNC|BRA|EXIT|CALL|RET|NOP|MEMBAR|FENCE|SYNCS|BSSY|BSYNC|WARPGROUPSET|ELECT|"
    "UTMALDG|UTMAPF|UBLKCP|ERRBAR|CCTL|ACQBULK|YIELD|USETMAXREG|NANOSLEEP|BREAK|PREEXIT|BPT|JMP|ENDCOLLECTIVE|UTMACCTL"
)


@dataclass
class Instruction:
    waits: int  # mask of the six scoreboards
    reads: int  # the scoreboard freed when operands are read, or -1
    writes: int  # the scoreboard freed when the result is there, or -1
    stall: int  # cycles until the next instruction of the warp
    predicate: str
    name: str
    operands: str
    pipe: str = "alu"
    busy: float = 0.0  # cycles of the pipe
    latency: int = 6
    nbytes: int = 0
    target: int = -1  # of a branch

    @property
    def base(self):
        return self.name.partition(".")[0]


def read(sass: str, capability: int) -> list[Instruction]:
    """The instructions of a kernel in their order."""
    machine, program, labels, branches = MACHINES[capability], [], {}, []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(program)
        elif found := _LINE.match(line):
            waits, reads, writes, stall, predicate, name, operands = found.groups()
            boards = [-1 if board == "-" else int(board) for board in (reads, writes)]
            waits = 0 if waits == "--" else int(waits)
            one = Instruction(waits, *boards, int(stall, 16), predicate or "", name, operands)
            _classify(one, machine, capability)
            if one.base == "BRA":
                branches.append((one, re.search(r"(\w+)\s*$", operands)[1]))
            program.append(one)
    for branch, place in branches:
        target = int(place, 16) // 16 if place.startswith("0x") else labels.get(place, -1)
        branch.target = target if 0 <= target < len(program) else -1
    return program


def _classify(one, machine, capability):
    def be(pipe, busy, latency=6, nbytes=0):
        one.pipe, one.busy, one.latency, one.nbytes = pipe, busy, latency, nbytes

    name, base = one.name, one.base
    width = next((size for suffix, size in _WIDTHS if suffix in name), 4)
    if one.predicate in ("@!PT", "@!UPT"):
        be("none", 0, 0)
    elif found := re.match(r"[IQH]GMMA\.\d+x(\d+)x\d+", name):
        columns = int(found[1])
        left_in_registers = re.match(r"R\d+, R\d+", one.operands)
        be("wgmma", columns / 2, 32, (0 if left_in_registers else 64 * 32) + columns * 32)
    elif re.match("UTC.?MMA", name):
        be("wgmma", 1, 32)
    elif base in ("IMMA", "HMMA", "QMMA"):
        be("tensor", _PRODUCTS[re.search(r"\.(\d{4,5})", name)[1]] / _rate(name, base, machine), machine.latency)
        one.busy /= WARP_LEVEL_ON_90 if capability == 90 else 1
    elif base in _FMA or base in _FMA_TWO:
        be("fma", machine.fma * (2 if base in _FMA_TWO else 1))
    elif base == "IMAD":
        be("fma", 1 if capability == 120 else 2)
    elif base in _SLOW:
        be("slow", 8, 22)
    elif base in ("LDSM", "STSM"):
        nbytes = {"4": 512, "2": 256}.get(name[-1], 128)
        be("memory", nbytes / 32, 30, nbytes)
    elif base in ("LDS", "STS"):
        be("memory", max(width, 4), 30, 32 * max(width, 4))
    elif base == "SHFL":
        be("memory", 4, 24)
    elif base in ("STL", "LDL"):
        be("memory", 4 * width, 35, 32 * width)
    elif base == "LDGSTS":
        be("copy", width, 600, 32 * width)
    elif base in ("LDG", "LD"):
        be("load", max(4, width), 400, 32 * width)
    elif base in ("STG", "ST"):
        be("store", max(4, 2 * width), 30, 32 * width)
    elif base in ("RED", "ATOM", "ATOMG", "REDG"):
        be("store", 8, 400)
    elif base in _OTHERS:
        be("none", 0, 12 if base == "R2UR" else 20)
    elif _CONTROL.fullmatch(base):
        be("control", 0, 20)
    elif base.startswith("U"):
        be("uniform", 1)
    else:
        be("alu", 2 if base in _TWO_CYCLES else machine.alu)


def _rate(name, base, machine):
    if base == "IMMA":
        return machine.int8
    if "TF32" in name:
        return machine.half / 2
    summed_in_half = ".F16" in name and ".F32" not in name
    if base == "QMMA":
        return machine.fp8_half if summed_in_half else machine.fp8
    return machine.half_half if summed_in_half else machine.half
