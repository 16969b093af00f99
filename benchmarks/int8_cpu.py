"""Time of int8_linear on a CPU, quantization of the activations included, beside the float32 linear.

    python -m benchmarks.int8_cpu [--runs 40] [--threads 1] [--out benchmarks/results/cpu/int8_linear.json]

The three take turns, so that a busy moment meets all of them; the median of the runs counts. On a machine that does
other work --threads 1 is the fair comparison: int8_linear is many short parallel steps, each waits for every thread.
The error is relative to the float64 product of the unquantized inputs. Fails before timing if an error is larger than
quantization explains.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from turbo_core.int8 import int8_linear, quantize_block, quantize_rows

M, K, N = 1024, 1536, 1536  # a thousand tokens through a projection of the 1.3B model
LARGEST_ERROR = {"float32": 1e-5, "int8_row": 0.02, "int8_block": 0.02}


def candidates(x, weight, bias):
    """{name: function of nothing} -> [M, N]."""
    row, block = quantize_rows(weight), quantize_block(weight)
    return {
        "float32": lambda: F.linear(x, weight, bias),
        "int8_row": lambda: int8_linear(x, *row, bias),
        "int8_block": lambda: int8_linear(x, *block, bias),
    }


def interleaved(functions, runs):
    """{name: seconds of each run}; one of each per round."""
    seconds = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def write_json(path, content):
    """Written aside and renamed, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, path)


def measure(runs):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((M, K), (N, K), (N,)))
    exact = F.linear(x.double(), weight.double(), bias.double())
    functions, errors = candidates(x, weight, bias), {}
    for name, function in functions.items():
        errors[name] = ((function() - exact).norm() / exact.norm()).item()
        assert errors[name] < LARGEST_ERROR[name], f"{name} is wrong: relative error {errors[name]:.2e}"
    interleaved(functions, 3)  # warm-up
    median = {name: statistics.median(s) for name, s in interleaved(functions, runs).items()}
    return [
        {
            "name": name,
            "ms": round(1e3 * s, 3),
            "gflops": round(2e-9 * M * K * N / s, 1),
            "speedup": round(median["float32"] / s, 2),
            "relative_error": float(f"{errors[name]:.3g}"),
        }
        for name, s in median.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu/int8_linear.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = measure(args.runs)
    print(f"M={M} K={K} N={N}, median of {args.runs}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':12}{'ms':>9}{'GFLOPS':>9}{'x float32':>11}{'error':>11}")
    for r in rows:
        print(f"{r['name']:12}{r['ms']:9.2f}{r['gflops']:9.1f}{r['speedup']:11.2f}{r['relative_error']:11.1e}")
    setting = {
        "shape": {"m": M, "k": K, "n": N},
        "runs": args.runs,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
    }
    write_json(args.out, setting | {"results": rows})


if __name__ == "__main__":
    main()
