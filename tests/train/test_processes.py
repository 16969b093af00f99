"""Two processes started by torchrun end with the same weights as each other, and resume to the same ones."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.ranks import needs_torchrun, run_ranks

pytestmark = pytest.mark.slow


@needs_torchrun
@pytest.mark.parametrize("shard", [(), ("--shard",)], ids=["DDP", "FSDP2"])
def test_two_processes(shard, tmp_path):
    done = run_ranks(2, Path(__file__).with_name("two_processes.py"), tmp_path, *shard, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("teacher", "student", "sparse", "experts"):
        first, second = ((tmp_path / f"{name}{rank}.safetensors").read_bytes() for rank in (0, 1))
        assert first == second, name
        # the file that all processes wrote together
        saved, held = load_file(tmp_path / f"{name}.safetensors"), load_file(tmp_path / f"{name}0.safetensors")
        for key, tensor in saved.items():
            assert torch.equal(tensor, held.get(key, held.get(f"high.{key}")).to(tensor.dtype)), key
    for key, tensor in load_file(tmp_path / "experts-low.safetensors").items():
        assert torch.equal(tensor, held[f"low.{key}"].to(tensor.dtype)), key
    assert any(not torch.equal(held[f"low.{key}"], held[f"high.{key}"]) for key in saved)
