"""Fused blocks by the kernels in two processes, against the same in one."""

import json

from tests.helpers.ranks import ROOT, needs_torchrun, run_ranks


@needs_torchrun
def test_two_processes_compute_what_one_does():
    """The bits are the same: RMSNorm over all heads from the sums of both, scales of whole blocks, int8 handed over."""
    done = run_ranks(2, ROOT / "tests" / "parallel" / "forwards.py", 2, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == 3
    for ranks in cases:
        assert all(found["same"] for found in ranks), ranks
