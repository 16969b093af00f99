"""Run by torchrun in two processes, as DDP copies or, with --shard, FSDP2 shards: all stages, one of them resumed."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.helpers.training import clips, model, pair
from turbo_core.parallel import leave
from turbo_core.train import distill, engine, models, optim, sparsify, teacher


def main(folder: Path, shard: bool) -> None:
    engine.start_processes("cpu")
    data, images = clips(), clips(images=True)
    options = {"batch": 2, "shard": shard, "log": lambda line: None}

    def train(name, steps, seconds=None):
        return teacher.train(model(), data, folder / name, steps, seconds=seconds, **options)[0]

    straight = optim.whole(train("straight", 4).state_dict())
    train("halted", 4, seconds=0.0)  # one step
    resumed = train("halted", 4)
    student, _ = distill.train(model(), model(), model(), data, folder / "distill", 3, alone=0.4, **options)
    sparse, _ = sparsify.train(model(), model(), data, folder / "sparsify", 2, topk=0.5, **options)
    # one clip a process: some steps leave an expert to one process, or to none
    experts, _ = distill.train(pair(), pair(), pair(), images, folder / "experts", 3, **(options | {"batch": 1}))
    for name, trained in (("teacher", resumed), ("student", student), ("sparse", sparse), ("experts", experts)):
        files = [folder / f"{name}.safetensors", folder / f"{name}-low.safetensors"]
        models.save_models(trained, files)
        save_file(optim.whole(trained.state_dict()), folder / f"{name}{engine.rank()}.safetensors")
    assert engine.gathered([engine.rank()]) == [0, 1]
    resumed = optim.whole(resumed.state_dict())
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--shard" in sys.argv)
    leave(0)
