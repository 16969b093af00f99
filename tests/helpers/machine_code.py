"""What is recorded of a kernel's machine code for a card: facts of the pinned compiler, a forecast of its cycles."""

import json
from pathlib import Path

import triton

from . import aot, sass, shipped
from .sass_cost import Code, tile_cycles, turn_cycles
from .sass_read import MACHINES

RECORD = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "forecast" / "kernels.json"
CARDS = (80, 89, 90, 120)
WITHIN = 0.1  # of the recorded figure; harmless changes stay within it
PER_PRODUCT = ("LDSM", "PRMT", "MOV")  # loads of operands, and what only moves bytes about


def launches(capability) -> dict:
    """{name in the record: (kernel, arguments, options)} of a card."""
    attend = {
        "attention SageSLA, int8 out": shipped.attention("int8", True, capability, quantize=True),
        "attention SLA bf16, int8 out": shipped.attention("bf16", True, capability, quantize=True),
    }
    found = {name: made[-1] for name, made in attend.items()}
    found |= {name: shipped.product(capability, name, shipped.LENGTH) for name in shipped.FORMS}
    return found | shipped.streaming(capability)


def facts(name, capability, compiled) -> dict:
    """The row of one kernel and card. Cycles: of a multiprocessor for one program, K or 64 * KEPT keys long."""
    found = {
        "registers": sass.registers(compiled),
        "spills": aot.spills(compiled),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
    }
    if name not in shipped.FORMS and not name.startswith("attention"):
        return found
    found["buffers"] = min(sass.buffers(compiled).values(), default=0)
    if capability not in MACHINES:
        return found
    code = Code(compiled.asm["sass"], capability, found["registers"], found["shared"], found["warps"])
    counts, products = code.counts(), code.products()
    found |= {"resident": code.resident, "products": products, "instructions": len(code.loop)}
    found |= {base: round(counts[base] / products, 2) for base in PER_PRODUCT}
    if name in shipped.FORMS:
        config = shipped.config(capability, name)
        macs = config.block_m * config.block_n * 128
        of_turn = sum(one.busy for one in code.loop if one.pipe in ("tensor", "wgmma")) * 4 * MACHINES[capability].int8
        steps = of_turn * max(1, code.warps // 4) * code.consumers / macs  # that the compiler unrolled in a turn
        turns = shipped.SIZES[name.split()[1]][1] / 128 / steps
        load = (config.block_m + config.block_n) * 128 * steps
        scale = 128 * 128 / (config.block_m * config.block_n)
    else:
        turns, scale, load = shipped.KEPT, 1, 128 * 64 * (2 if "Sage" in name and capability >= 89 else 4)
    found["turns"], found["turn"] = round(turns), round(turn_cycles(code) * scale)
    found["cycles"] = round(tile_cycles(code, found["turns"], load) * scale)
    return found


def recorded() -> dict:
    return json.loads(RECORD.read_text("utf-8"))


def differences(name, capability, compiled) -> list[str]:
    """What is not within WITHIN of the record; empty where it holds, and for other cards and Tritons."""
    record = recorded()
    if record["triton"] != triton.__version__ or capability not in CARDS:
        return []
    was, now = record["now"][f"{name}, sm_{capability}"], facts(name, capability, compiled)
    return [
        f"{name}, sm_{capability}: {key} was {was.get(key)}, is {now[key]}"
        for key in now
        if key not in was or abs(now[key] - was[key]) > WITHIN * max(abs(was[key]), 1)
    ]
