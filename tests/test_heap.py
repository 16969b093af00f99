"""Memory of freed tensors: kept for the next ones on a CPU, where glibc is told so."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FAULTS = """
import resource, sys
import torch
from turbo_core.heap import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_freed_memory(torch.device("cpu"))
for i in range(40):
    if i == 20:  # aligned blocks drift before they come back
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)  # 64 MiB, more than glibc ever keeps by itself
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc is what is told")
def test_freed_memory_is_kept():
    def faults(how):
        command = [sys.executable, "-c", FAULTS, how]
        plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        return int(subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 0.25 * faults("leave")  # pages of memory that came anew
