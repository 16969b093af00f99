"""A quarter of an hour on a card that is there for once: the open questions of the kernels, the first ones first.

    python -m tests.tools.borrowed_card [--quick] [--device cpu]

Each step is a process of its own with a time of its own, so that one that fails or hangs does not take the others
along. Results: benchmarks/results/CARD. --quick: tiny shapes, does it run? On a CPU that needs TRITON_INTERPRET=1.
The launches that `rows` finds are written to launches.json: what wins there belongs into kernels/int8_configs.py.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch

from turbo_core.bench import harness, tune
from turbo_core.bench.machine import slug
from turbo_core.devices import pick_device
from turbo_core.selfcheck import prove
from turbo_core.sla import fast

OUT = Path("benchmarks/results")
ROUNDS = 20
# name -> seconds it may take
STEPS = {"check": 240, "stages": 120, "rows": 300, "clip": 200}


def check(device, out, quick):
    """Every kernel held to its oracle on awkward shapes, then the streaming kernels' times."""
    return _turbo_core("bench", "streaming", "--check", "--seconds", "0.5", *_common(device, out), *["--quick"] * quick)


def clip(device, out, quick):
    """Prompt to MP4 in whole processes."""
    return _turbo_core("bench", "clip", *_common(device, out), *["--quick"] * quick)


def stages(device, out, quick):
    """The attention kernel with one buffer of keys and with two: equal bits, milliseconds of each."""
    from turbo_core.kernels import launch, sla_attention

    heads, length = (2, 300) if quick else (40, 75600)
    generator = torch.Generator(device).manual_seed(0)
    shape = 1, length, heads, 128
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16) for _ in range(3))
    made = []
    with patch.object(sla_attention, "run", lambda *given: made.append(given) or launch.run(*given)):
        fast.sparse_linear_attention(q, k, v, None, None, 0.1, None, 128, 64, "int8")
    kernel, grid, arguments, options = made[-1]
    result = arguments[kernel.arg_names.index("o_ptr")]
    calls, outputs = [], []
    for count in (3, 5):
        calls.append(lambda count=count: launch.run(kernel, grid, arguments, options | {"num_stages": count}))
        calls[-1]()
        outputs.append(result.clone())
    clock = harness.clock_of(device)
    times = zip(*(clock.round(calls, False) for _ in range(1 if quick else ROUNDS)))
    found = {count: 1e3 * statistics.median(seconds) for count, seconds in zip((3, 5), times)}
    same = torch.equal(*outputs)
    _write(out / "stages.json", {"shape": shape, "milliseconds": found, "same_bits": same})
    return 0 if same else 1


def rows(device, out, quick):
    """The launches of the products of long videos, every candidate held to the plainest one."""
    cases = [case for case in tune.default_cases() if case.length == "long"]
    if quick:
        cases = [tune.Case(case.form, "short", 5, 128, 128) for case in cases[:1]]
    found = tune.tune(device, cases, print, out / "launches.json")
    _write(out / "rows.json", found["microseconds"])
    return 0


def _common(device, out):
    return "--device", str(device), "--out", str(out.parent)


def _turbo_core(*arguments):
    return subprocess.run([sys.executable, "-m", "turbo_core", *arguments]).returncode


def _write(path, found):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(json.dumps(found))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", nargs="?", choices=STEPS, help="this one alone, in this process")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device")
    given = parser.parse_args()
    device = pick_device(given.device)
    out = OUT / slug(device)
    if given.step:
        if given.step in ("stages", "rows"):
            prove(device)
        with torch.no_grad():
            return globals()[given.step](device, out, given.quick)
    said = {}
    for step, seconds in STEPS.items():
        command = [sys.executable, "-m", "tests.tools.borrowed_card", step, "--device", str(device)]
        start = time.monotonic()
        process = subprocess.Popen([*command, *["--quick"] * given.quick], start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes it has started
            code = f"not done after {seconds} s"
        said[step] = {"exit": code, "seconds": round(time.monotonic() - start, 1)}
        _write(out / "borrowed_card.json", said)
    return int(any(one["exit"] != 0 for one in said.values()))


if __name__ == "__main__":
    sys.exit(main())
