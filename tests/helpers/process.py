"""Run Python in a process of its own, with Triton's interpreter or without: triton reads that when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_python(*args, interpret: bool, path=(), timeout=300, **variables) -> str:
    """Run this Python with args in the repository root and return its standard output.

    interpret: with Triton's CPU interpreter, else its compiler. path: more folders to import from. variables: more of
    the environment. Fails the test with both outputs when the process does.
    """
    env = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "PYTEST_"))}
    env |= {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path))),
        "TRITON_DEFAULT_FP_FUSION": "1",  # triton 3.10 flips the default
        "OMP_NUM_THREADS": "1",  # the tensors are small: more threads only wait for each other
    } | variables
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{args} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
