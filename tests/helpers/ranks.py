"""Run Python in several processes by torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_torchrun = pytest.mark.skipif(
    os.name == "nt", reason="torchrun's rendezvous needs libuv, Windows' torch lacks it"
)


def run_ranks(count: int, *args, timeout=300, **variables) -> subprocess.CompletedProcess:
    """Run args (a script, or -m and a module) in count processes of one thread, in the repository root."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables
    given = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": timeout}
    return subprocess.run([*command, *map(str, args)], **given)
