"""Measures what a second process brings: one Wan block by one process, by two together, and by each of two alone.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m tests.tools.measure_parallel benchmarks/results/cpu

For a machine with two free cores; takes 50 seconds. The rounds go A B C C B A, so that drift of the machine shows as
spread. C, each alone at the same time, is the most that two cores could bring: they share cache and memory. The seconds
that a process computes tell more than those on the wall where other work runs beside it; what the processes wait for
each other is in the wall's alone.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from turbo_core.bench import machine
from turbo_core.int8 import quantize_rows
from turbo_core.parallel import Sequence
from turbo_core.rope import rope_angles
from turbo_core.train.engine import keep_freed_memory
from turbo_core.wan import QUANTIZED_LINEARS, Block, Int8Linear

GRID = (7, 30, 52)  # 832 x 480, 25 frames: 10920 tokens
DIM, FFN, HEADS, TEXT = 1536, 8960, 12, 512
TOPK = 0.1
ROUNDS = "ABCCBA"
KINDS = {"int8 row, SageSLA": (TOPK, "int8", True)}  # top-k, precision, whether the linears are int8


def block(int8: bool) -> Block:
    torch.manual_seed(0)
    made = Block(DIM, FFN, HEADS, 1e-6, True).eval()
    for name in QUANTIZED_LINEARS if int8 else ():
        layer = made.get_submodule(name)
        made.set_submodule(name, Int8Linear(*quantize_rows(layer.weight), layer.bias))
    return made


@torch.inference_mode()
def measure(sequence, kind: str) -> dict:
    """Seconds of every round, and whether the tokens are those of one process."""
    topk, precision, int8 = KINDS[kind]
    run, length = block(int8), GRID[0] * GRID[1] * GRID[2]
    x, modulation, context = torch.randn(1, length, DIM), torch.randn(1, 6, DIM), torch.randn(1, TEXT, DIM)
    angles = rope_angles(GRID, DIM // HEADS, "cpu")
    shards = sequence.over(1, length, HEADS)
    seconds = {clock: {name: [] for name in "ABC"} for clock in ("wall", "computing")}
    results = {}
    for i, name in enumerate("B" + ROUNDS):  # the first round fetches code and memory, and is not counted
        dist.barrier()
        start, computing = time.perf_counter(), time.process_time()
        if name == "B":
            own = run(x[:, shards.own].contiguous(), modulation, context, angles, topk, precision, shards=shards)
            results[name] = shards.whole(own)
        elif name == "C" or sequence.rank == 0:
            results[name] = run(x, modulation, context, angles, topk, precision)
        used = torch.tensor(time.process_time() - computing)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        if i:
            seconds["wall"][name].append(time.perf_counter() - start)
            seconds["computing"][name].append(used.item())
    return {"tokens": length, "seconds": seconds, "same": torch.equal(results["B"], results["C"])}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    keep_freed_memory()
    torch.set_num_threads(1)
    sequence = Sequence()
    facts = machine.facts("cpu")
    found = {kind: measure(sequence, kind) for kind in KINDS}
    if sequence.rank == 0:
        report = {"machine": facts, "processes": sequence.size, "blocks": found}
        (folder / "parallel.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        (folder / "parallel.md").write_text(as_text(report), "utf-8")
    dist.destroy_process_group()


def as_text(report: dict) -> str:
    facts = report["machine"]
    where = f"{facts['name']}, {facts['cores']} cores, torch {facts['versions']['torch']}, {facts['date'][:10]}"
    lines = [
        f"# One Wan block by {report['processes']} processes of one thread: {where}",
        "",
        f"dim {DIM}, ffn {FFN}, {HEADS} heads, {TEXT} text tokens. Seconds of each round; the order is {ROUNDS}.",
        "Computing is what the busiest process used of its core.",
        *filter(None, [machine.busy(facts)]),
        "",
        "| block | tokens | seconds | A one process | B together | C each alone | A / B | 2 A / C | same bits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind, found in report["blocks"].items():
        for clock, seconds in found["seconds"].items():
            a, b, c = (statistics.median(seconds[name]) for name in "ABC")
            rounds = (", ".join(f"{s:.2f}" for s in seconds[name]) for name in "ABC")
            same = "yes" if found["same"] else "no"
            cells = kind, f"{found['tokens']:,}", clock, *rounds, f"{a / b:.2f}", f"{2 * a / c:.2f}", same
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
