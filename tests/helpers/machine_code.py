"""What is recorded of a kernel's machine code for a card: facts of the pinned compiler, a forecast of its cycles."""

import json
from pathlib import Path

import triton

from . import aot, sass, shipped
from .sass_cost import Code, tile_cycles, turn_cycles
from .sass_read import MACHINES, read

RECORD = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "forecast" / "kernels.json"
CARDS = (80, 86, 89, 90, 100, 120)
TIMED = (80, 86, 89, 90, 120)  # whose cycles the model knows
WITHIN = 0.1  # of the recorded figure; harmless changes stay within it
PER_PRODUCT = ("LDSM", "PRMT", "MOV")  # loads of operands, and what only moves bytes about
SHORT = 512  # rows


def launches(capability) -> dict:
    """{name in the record: (kernel, arguments, options)} of a card; of sm_86 what differs from sm_89's."""
    attend = {
        "attention SageSLA, int8 out": shipped.attention("int8", True, capability, quantize=True),
        "attention SLA bf16, int8 out": shipped.attention("bf16", True, capability, quantize=True),
    }
    found = {name: made[-1] for name, made in attend.items()}
    if capability == 86:
        return found | {"_prepare_kernel": shipped.streaming(capability)["_prepare_kernel"]}
    found |= {name: shipped.product(capability, name, shipped.LENGTH) for name in shipped.FORMS}
    short = [name for name in shipped.FORMS if name != "block quantize"]  # of that there is one launch
    found |= {f"{name}, {SHORT} rows": shipped.product(capability, name, SHORT) for name in short}
    return found | shipped.streaming(capability)


def facts(name, capability, compiled, cycles=True) -> dict:
    """The row of one kernel and card. Cycles: of a multiprocessor for one program, K or 64 * KEPT keys long."""
    found = {
        "registers": sass.registers(compiled),
        "spills": aot.spills(compiled),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
    }
    product = next((form for form in shipped.FORMS if name.startswith(form)), None)
    if product is None and not name.startswith("attention"):
        whole = sum(one.base != "NOP" for one in read(compiled.asm["sass"], capability))
        return found | {"instructions": whole} | sass.memory(compiled)
    found["buffers"] = min(sass.buffers(compiled).values(), default=0)
    code = Code(compiled.asm["sass"], capability, found["registers"], found["shared"], found["warps"])
    counts, products = code.counts(), code.products()
    found |= {"resident": code.resident, "products": products, "instructions": len(code.loop)}
    found |= {base: round(counts[base] / products, 2) for base in PER_PRODUCT}
    if cycles and capability in TIMED and name != f"{product}, {SHORT} rows":
        found |= _cycles(code, name, capability)
    return found


def _cycles(code, name, capability) -> dict:
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
    turn, whole = turn_cycles(code), tile_cycles(code, round(turns), load)
    return {"turns": round(turns), "turn": round(turn * scale), "cycles": round(whole * scale)}


def recorded() -> dict:
    return json.loads(RECORD.read_text("utf-8"))


def differences(name, capability, compiled) -> list[str]:
    """What is not within WITHIN of the record; empty where it holds, and for other cards and Tritons."""
    record = recorded()
    if record["triton"] != triton.__version__ or capability not in CARDS:
        return []
    was, now = record["now"][f"{name}, sm_{capability}"], facts(name, capability, compiled, cycles=False)
    return [
        f"{name}, sm_{capability}: {key} was {was.get(key)}, is {now[key]}"
        for key in now
        if key not in was or abs(now[key] - was[key]) > WITHIN * max(abs(was[key]), 1)
    ]
