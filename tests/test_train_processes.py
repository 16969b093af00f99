"""Two processes started by torchrun end with the same weights as each other, and resume to the same ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(os.name == "nt", reason="torchrun's rendezvous needs libuv, which Windows' torch lacks")
@pytest.mark.parametrize("shard", [(), ("--shard",)], ids=["DDP", "FSDP2"])
def test_two_processes(shard, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = ROOT / "tests" / "train_processes.py"
    done = subprocess.run(
        [*command, str(script), str(tmp_path), *shard],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("teacher", "student", "sparse"):
        first, second = ((tmp_path / f"{name}{rank}.safetensors").read_bytes() for rank in (0, 1))
        assert first == second, name
