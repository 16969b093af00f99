"""Run by torchrun in two processes, as DDP copies or, with --shard, FSDP2 shards: all stages, one of them resumed."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from turbo_core.train import distill, engine, models, optim, sparsify, teacher
from turbo_core.train.data import Data
from turbo_core.train.dit import TrainWan
from turbo_core.train.experts import Experts


def main(folder: Path, shard: bool) -> None:
    engine.start_processes("cpu")
    random = torch.Generator().manual_seed(0)
    latents, text = torch.randn(6, 16, 3, 4, 4, generator=random), torch.randn(7, 5, 8, generator=random)
    data = Data(latents, text, torch.tensor([1, 5, 3, 4, 5, 2, 5]), torch.arange(1, 7)[:, None])

    images = data._replace(images=torch.randn(6, 20, 3, 4, 4, generator=random))

    options = {"batch": 2, "shard": shard, "log": lambda line: None}

    def model(**more):
        torch.manual_seed(0)
        return TrainWan(64, 96, 1, 2, text_dim=8, sla=True, **more)

    def pair():
        return Experts(model(in_dim=36), model(in_dim=36))

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
    resumed = optim.whole(resumed.state_dict())
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--shard" in sys.argv)
