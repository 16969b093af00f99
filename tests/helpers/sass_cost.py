"""Cycles of a kernel by its machine code: one partition of a multiprocessor, simulated in order. A forecast.

Warps issue one instruction a cycle in turn, as stall counts, scoreboards, barriers and pipes let them. docs/forecast.md
has the published figures that it was held to; between kernels of one card it is right within about 8 %. It
knows no power limit, flatters tiles 32 deep and the way out of persistent kernels.
"""

import dataclasses
import math
import re
from collections import Counter

from .sass_read import MACHINES, read

QUEUE = 96  # cycles of work that may wait in front of the memory pipe
_MEMORY = ("memory", "load", "store", "copy")
_OWN_PIPE = ("fma", "alu", "slow", "tensor")


class Code:
    """A compiled kernel as the model sees it."""

    def __init__(self, sass, capability, registers, shared, warps):
        # of the warps of a specialized kernel 8 multiply, in two groups that each do half of every step
        self.consumers = 2 if warps == 12 else 1
        self.capability, self.warps = capability, 4 if warps == 12 else warps
        self.program = read(sass, capability)
        self.start, self.end = _main_loop(self.program)
        self.resident = 2 if warps == 12 else _resident(MACHINES[capability], registers, shared, warps)
        self.accelerator = "UTMALDG" in sass  # loads of tiles by the tensor memory accelerator

    @property
    def loop(self):
        return self.program[self.start : self.end + 1]

    def counts(self) -> Counter:
        """Instructions of one turn of the main loop by name; register moves by IMAD as MOV."""
        return Counter("MOV" if one.name.startswith(("IMAD.MOV", "IMAD.U32")) else one.base for one in self.loop)

    def products(self) -> int:
        """Matrix instructions of one turn."""
        return sum(one.pipe in ("tensor", "wgmma") for one in self.loop)


def turn_cycles(code: Code) -> float:
    """Cycles of a multiprocessor for one turn of the main loop of one program, while others run beside it."""
    loop, warps = code.loop, max(1, code.warps // 4)
    shared = sum(
        one.nbytes / (4 if one.pipe == "wgmma" else 1) for one in loop if one.pipe in ("memory", "copy", "wgmma")
    )
    few, many = (_repeat(code, turns) for turns in (4, 18))
    return max((many - few) / 14, shared * warps / 32)


def tile_cycles(code: Code, turns: int, tile_bytes: int = 0) -> float:
    """The same for one program from its start to its end. tile_bytes: what one turn loads, for the L2 cache's rate."""
    machine = MACHINES[code.capability]
    turn = max(turn_cycles(code), tile_bytes / machine.l2)
    if not code.accelerator:
        whole = _simulate(code.program, code, {code.end: turns}, rounds=3, l2=machine.l2, far=500)
        return max(whole, turn * turns)
    outer = [loop for loop in _loops(code.program) if loop[0] < code.start and loop[1] > code.end]
    last = min(outer, key=lambda loop: loop[1] - loop[0])[1] if outer else len(code.program)
    tail = sum(max(1, one.stall) for one in code.program[code.end + 1 : last]) * max(1, code.warps // 4)
    return turn * turns + tail / max(1, code.resident) + 300


def _resident(machine, registers, shared, warps):
    """Programs that a multiprocessor holds."""
    by_registers = 65536 // (math.ceil(max(registers, 16) / 8) * 8 * 32 * warps)
    return max(1, min(by_registers, machine.shared // (shared + 1024), machine.warps // warps))


def _loops(program):
    """(first, last) of every branch that goes back, the short ones first."""

    def waits_for_a_barrier(at):  # the way back of a wait that lies out of the line
        before = program[at - 1]
        straight = not program[at].predicate and "UP" not in program[at].operands
        return straight and before.base == "BRA" and at - 4 <= before.target < at

    back = [(one.target, at) for at, one in enumerate(program) if one.base == "BRA" and 0 <= one.target < at]
    return sorted((loop for loop in back if not waits_for_a_barrier(loop[1])), key=lambda loop: loop[1] - loop[0])


def _main_loop(program):
    """The innermost loop with the most work of the tensor cores."""
    best, most = None, 0
    for start, end in _loops(program):
        work = sum(one.busy for one in program[start : end + 1] if one.pipe in ("tensor", "wgmma"))
        around = best and start <= best[0] and end >= best[1]
        if work and (best is None or (work > 1.01 * most and not around)):
            best, most = (start, end), work
    return best


def _repeat(code, turns):
    """Cycles of the main loop alone, so many times."""
    loop = [dataclasses.replace(one) for one in code.loop]
    for at, one in enumerate(loop):
        if one.base == "BRA":
            inside = code.start <= one.target <= code.end
            one.target = one.target - code.start if inside else -1
            if at == len(loop) - 1:
                one.target, one.predicate = 0, "@P"
            elif one.target < 0 and not one.predicate:
                one.name = "NOP"
        elif one.base == "EXIT":
            one.name = "NOP"
    return _simulate(loop, code, {len(loop) - 1: turns}, rounds=1, l2=1000, far=300)


class _Warp:
    def __init__(self, slot, at):
        self.slot, self.ready, self.issued = slot, at, at
        self.place, self.barrier, self.done = 0, None, False
        self.boards, self.turns = [0.0] * 8, {}
        self.copies, self.groups, self.products = 0.0, [], []  # loads on their way: the open group, closed ones


def _pending(found, groups, at):
    """The time at which no more than so many groups are under way."""
    left = int(found[1], 16) if found else 0
    return max(at, groups[len(groups) - 1 - left]) if len(groups) > left else at


def _earliest(warp, one, free):
    at = warp.ready
    for board in range(6):
        if one.waits >> board & 1:
            at = max(at, warp.boards[board])
    if one.pipe in _OWN_PIPE:
        at = max(at, free[one.pipe])
    elif one.pipe in _MEMORY:
        at = max(at, free["memory"] - QUEUE)
    elif one.name.startswith("DEPBAR"):
        at = _pending(re.search(r"SB0, (?:0x)?(\w+)", one.operands), warp.groups, at)
    elif one.name.startswith("WARPGROUP.DEPBAR"):
        at = _pending(re.search(r"gsb0, (?:0x)?(\w+)", one.operands), warp.products, at)
    return at


def _issue(warp, one, now, free, l2, far, load):
    """Occupies the pipe; the scoreboards of the warp learn when operands are read and the result is there."""
    done = now + one.latency
    if one.pipe in _OWN_PIPE:
        free[one.pipe] = now + one.busy
        done = now + max(one.latency, one.busy if one.pipe == "tensor" else 0)
    elif one.pipe in _MEMORY:
        begun = max(now, free["memory"])
        free["memory"] = begun + one.busy
        done = begun + one.busy + (load if one.pipe == "load" else one.latency)
        if one.pipe == "copy":
            free["l2"] = max(now, free["l2"]) + one.nbytes / l2
            warp.copies = max(warp.copies, free["l2"] + far)
            done = begun + 20
    elif one.pipe == "wgmma":
        free["tensor"] = max(now, free["tensor"]) + one.busy
        if "gsb0" in one.operands:
            warp.products.append(free["tensor"] + one.latency)
    if one.writes >= 0:
        warp.boards[one.writes] = max(warp.boards[one.writes], done)
    if one.reads >= 0:
        read_at = max(now, free["memory"]) if one.pipe == "memory" else now + 12
        warp.boards[one.reads] = max(warp.boards[one.reads], read_at)
    warp.ready = now + max(1, one.stall)


def _simulate(program, code, turns, rounds, l2, far):
    """Cycles a program when `rounds` of them go through each place of a multiprocessor.

    turns: {place of a branch that goes back: how often its loop runs}, else once. l2: bytes a cycle; far: cycles that a
    copy to shared memory takes.
    """
    free = dict.fromkeys((*_OWN_PIPE, "memory", "l2"), 0.0)
    share = max(1, code.warps // 4)
    warps = [_Warp(slot, 37.0 * slot) for slot in range(code.resident) for _ in range(share)]
    left = [rounds - 1] * code.resident
    now = end = -1.0
    while warps:
        chosen, at = None, math.inf
        for warp in warps:
            if warp.barrier is None:
                time = _earliest(warp, program[warp.place], free)
                if time < at or (time == at and warp.issued < chosen.issued):
                    chosen, at = warp, time
        warp, one = chosen, program[chosen.place]
        now = warp.issued = max(at, now + 1)
        inside = turns.keys() == {len(program) - 1} or code.start <= warp.place <= code.end
        _issue(warp, one, now, free, l2 / 4, far, 60 if inside else 700)
        following = warp.place + 1
        if one.name.startswith("LDGDEPBAR"):
            warp.groups.append(warp.copies)
        elif one.name.startswith(("BAR.SYNC", "BAR.RED")):
            warp.barrier = following
            mates = [other for other in warps if other.slot == warp.slot]
            if all(mate.barrier is not None for mate in mates):
                for mate in mates:
                    mate.place, mate.barrier, mate.ready = mate.barrier, None, now + 22
            continue
        elif one.base == "BRA" and one.target >= 0:
            if one.target <= warp.place:
                again = warp.turns.get(warp.place, turns.get(warp.place, 1)) - 1
                warp.turns[warp.place] = again if again > 0 else turns.get(warp.place, 1)
                following = one.target if again > 0 else following
            elif not one.predicate and "UP" not in one.operands:
                following = one.target
        ended = one.base == "EXIT" and not one.predicate
        if ended or following >= len(program):
            warps.remove(warp)
            end = max(end, now)
            if left[warp.slot] and not any(other.slot == warp.slot for other in warps):
                left[warp.slot] -= 1
                warps += [_Warp(warp.slot, now + 300) for _ in range(share)]
            continue
        warp.place = following
    return end / rounds / code.resident
