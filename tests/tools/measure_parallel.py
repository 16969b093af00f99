"""Measures what a second process brings: work done by one process, by two together, and by each of two alone.

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m tests.tools.measure_parallel benchmarks/results/cpu

For a machine with two free cores; takes a minute and a half. The rounds go A B C C B A, so that drift of the machine
shows as spread. C, each alone at the same time, is the most that two cores could bring: they share cache and memory.
The seconds that a process computes tell more than those on the wall where other work runs beside it; what the processes
wait for each other is in the wall's alone.
"""

import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from turbo_core.bench import machine
from turbo_core.heap import keep_freed_memory
from turbo_core.int8 import quantize_rows
from turbo_core.parallel import Rows, Sequence
from turbo_core.rope import rope_angles
from turbo_core.vae import WanVAE, decode_each, decode_rows
from turbo_core.wan import QUANTIZED_LINEARS, Block, Int8Linear

GRID = (7, 30, 52)  # 832 x 480, 25 frames: 10920 tokens
DIM, FFN, HEADS, TEXT = 1536, 8960, 12, 512
TOPK = 0.1
ROUNDS = "ABCCBA"


def block(sequence):
    """(what is measured, by one process, together): a Wan block."""
    torch.manual_seed(0)
    made = Block(DIM, FFN, HEADS, 1e-6, True).eval()
    for name in QUANTIZED_LINEARS:
        layer = made.get_submodule(name)
        made.set_submodule(name, Int8Linear(*quantize_rows(layer.weight), layer.bias))
    length = math.prod(GRID)
    x, modulation, context = torch.randn(1, length, DIM), torch.randn(1, 6, DIM), torch.randn(1, TEXT, DIM)
    given = modulation, context, rope_angles(GRID, DIM // HEADS, "cpu"), TOPK, "int8"
    shards = sequence.over(1, length, HEADS)

    def together():
        return shards.whole(made(x[:, shards.own].contiguous(), *given, shards=shards))

    return f"Wan block, int8 row, SageSLA, {length:,} tokens", lambda: made(x, *given), together


def decoding(sequence):
    """The same for decoding a video."""
    torch.manual_seed(0)
    vae, latent = WanVAE(32).eval(), torch.randn(1, 16, 2, *GRID[1:])
    rows = Rows(sequence, latent.shape[3])

    def alone():
        return torch.cat(decode_each(vae, latent, lambda piece: piece), 2)[
            ..., 8 * rows.own.start : 8 * rows.own.stop, :
        ]

    def together():
        return torch.cat(list(decode_rows(vae, latent, rows, 1)), 2)

    return "VAE of a third of the published width, 5 frames of 416 x 240 decoded", alone, together


@torch.inference_mode()
def measure(sequence, make) -> dict:
    """Seconds of every round, and how far the numbers are from those of one process."""
    what, alone, together = make(sequence)
    seconds = {clock: {name: [] for name in "ABC"} for clock in ("wall", "computing")}
    results = {}
    for i, name in enumerate("B" + ROUNDS):  # the first round fetches code and memory, and is not counted
        dist.barrier()
        start, computing = time.perf_counter(), time.process_time()
        if name == "B":
            results[name] = together()
        elif name == "C" or sequence.rank == 0:
            results[name] = alone()
        used = torch.tensor(time.process_time() - computing)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        if i:
            seconds["wall"][name].append(time.perf_counter() - start)
            seconds["computing"][name].append(used.item())
    apart = ((results["B"] - results["C"]).norm() / results["C"].norm()).item()
    return {"what": what, "seconds": seconds, "difference": apart}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    keep_freed_memory(torch.device("cpu"))
    torch.set_num_threads(1)
    sequence = Sequence()
    facts = machine.facts("cpu")
    found = [measure(sequence, make) for make in (block, decoding)]
    if sequence.rank == 0:
        report = {"machine": facts, "processes": sequence.size, "measured": found}
        (folder / "parallel.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        (folder / "parallel.md").write_text(as_text(report), "utf-8")
    dist.destroy_process_group()


def as_text(report: dict) -> str:
    facts = report["machine"]
    where = f"{facts['name']}, {facts['cores']} cores, torch {facts['versions']['torch']}, {facts['date'][:10]}"
    lines = [
        f"# {report['processes']} processes of one thread: {where}",
        "",
        f"Block: dim {DIM}, ffn {FFN}, {HEADS} heads, {TEXT} text tokens. Seconds of each round, which went {ROUNDS}.",
        "Computing is what the busiest process used of its core.",
        *filter(None, [machine.busy(facts)]),
        "",
        "| | seconds | A one process | B together | C each alone | A / B | 2 A / C | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for found in report["measured"]:
        for clock, seconds in found["seconds"].items():
            a, b, c = (statistics.median(seconds[name]) for name in "ABC")
            rounds = (", ".join(f"{s:.2f}" for s in seconds[name]) for name in "ABC")
            apart = f"{found['difference']:.0e}" if found["difference"] else "none"
            cells = found["what"], clock, *rounds, f"{a / b:.2f}", f"{2 * a / c:.2f}", apart
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
