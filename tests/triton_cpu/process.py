"""Run Triton tests in a process of their own.

TRITON_INTERPRET is read when a kernel's module is imported, and interpreted and compiled kernels do not mix, so each
kind gets a fresh interpreter. The files that run there are not named test_*.py: pytest does not collect them here.
"""

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


def run_pytest(file, interpret: bool, **options) -> str:
    """Run one file of tests in a process of its own, see run_python."""
    return run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", file, interpret=interpret, **options)
