"""The loop that all stages share: steps, checkpoints, resuming, several processes by torchrun.

A step draws everything random from generator(seed, step), so that a run which was killed and goes on from its last
checkpoint makes the same weights as one that was never interrupted.
"""

import datetime
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ..checkpoint.read import open_dump
from ..errors import TurboError, shown
from ..files import written_aside
from ..heap import keep_freed_memory
from . import optim

CHECKPOINT = "checkpoint.pt"


def generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """The random numbers of one step. stream sets apart what must not depend on each other, and processes."""
    mixed = (seed * 1_000_003 + step) * 1_009 + stream * 131 + rank()
    return torch.Generator().manual_seed(mixed % (1 << 63))


def shared(seed: int, step: int, most: int) -> int:
    """1 to `most`, the same in every process: shards are gathered by all of them together, so often."""
    random = torch.Generator().manual_seed((seed * 1_000_003 + step) % (1 << 63))
    return int(torch.randint(1, most + 1, (), generator=random))


def _by_nccl() -> bool:
    """True where what processes share lies on cards."""
    return "nccl" in str(dist.get_backend_config())


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def wait() -> None:
    """Until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def gathered(items: list) -> list:
    """The items of all processes in one list, in every process."""
    if not dist.is_initialized():
        return items
    parts = [None] * processes()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def start_processes(device: str) -> torch.device:
    """Join the processes that torchrun started, if it did; returns this one's device."""
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        # one process may have clips to encode that the others encoded before a kill
        # TinyWan's VAE and text encoder stay on the CPU, also where the transformer is on a card
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=6))
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    keep_freed_memory(torch.device(device))
    return torch.device(device)


def parallel(model, shard: bool = False, idle_parts: bool = False):
    """The model as every process must call it: itself alone; DDP copies; or FSDP2 shards, block by block.

    idle_parts: some steps leave parameters without a gradient.
    """
    if not dist.is_initialized():
        return model
    if not shard:
        return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=idle_parts)
    return spread(model, shard)


def spread(model, shard: bool = False):
    """A model whole in every process, or in FSDP2's shards on this process's device, wherever it was before; a second
    call changes nothing."""
    if dist.is_initialized() and shard and not isinstance(model, FSDPModule):
        mesh = init_device_mesh("cuda" if _by_nccl() else "cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def run(step_of, parts: dict, folder, steps: int, seconds: float | None = None, save_every: float = 60.0, log=print):
    """Call step_of(step) for every step up to `steps` and return the list of what it returned, {name: number}.

    parts: {name: anything with state_dict and load_state_dict}, saved to folder/checkpoint.pt every save_every
    seconds, or less often where saving takes more than a tenth of the time, and at the end, and read from there
    first, so that a second call goes on where the first was killed.
    seconds: stop after that many, a checkpoint is left to go on from. log: callable (line).
    Raises TurboError when the folder cannot be written, the disk is full, or the checkpoint is another model's.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TurboError(f"{folder} cannot be a folder for checkpoints ({error}). Choose another one.") from error
    history = load(parts, folder / CHECKPOINT)
    if history:
        log(f"going on from step {len(history)} of {folder / CHECKPOINT}")
    start = saved = said = time.monotonic()
    pause = save_every
    while len(history) < steps:
        values = step_of(len(history))
        history.append(values)
        for name, value in values.items():
            optim.check_finite(f"step {len(history)}: {name}", value)
        now = time.monotonic()
        if now - said > 10:
            said = now
            recent = history[-50:]
            told = {name: [one[name] for one in recent if name in one] for name in values}
            means = (f"{name} {sum(found) / len(found):.4g}" for name, found in told.items())
            log(f"step {len(history)}/{steps}  {now - start:.0f} s  " + "  ".join(means))
        last = len(history) == steps or (seconds is not None and now - start > seconds)
        if _agreed(last or now - saved > pause):
            save(parts, history, folder / CHECKPOINT)
            saved = time.monotonic()
            pause = max(save_every, 10 * (saved - now))
        if _agreed(last):
            break
    return history


def _agreed(decision: bool) -> bool:
    """The first process's decision in all of them: their clocks differ, and saving is done together."""
    if not dist.is_initialized():
        return decision
    flag = torch.tensor([int(decision)], device="cuda" if _by_nccl() else "cpu")
    dist.broadcast(flag, 0)
    return bool(flag.item())


def save(parts: dict, history: list, path: Path) -> None:
    """Write a checkpoint aside and rename it, from the first process."""
    states = {name: optim.whole(part.state_dict(), keep=rank() == 0) for name, part in parts.items()}
    if rank() == 0:
        try:
            with written_aside(path) as aside, open(aside, "wb") as file:
                torch.save({"parts": states, "history": _packed(history)}, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise TurboError(f"Could not write {path} ({error}). Free space and start again: it resumes.") from error


def load(parts: dict, path: Path) -> list:
    """Fill the parts from a checkpoint and return its history; an empty one when there is no file."""
    if not path.is_file():
        return []
    try:
        stored = open_dump(path)  # mapped: each process reads what it keeps
        for name, part in parts.items():
            state = stored["parts"][name]
            if isinstance(part, torch.nn.Module):
                now = part.state_dict()
                state = {key: optim.like(value, now.get(key, value)) for key, value in state.items()}
            part.load_state_dict(state)
        history = _unpacked(stored["history"])
    except Exception as error:  # what is in it may be anything, and parts take it apart in their own ways
        reason = (str(error).splitlines() or [type(error).__name__])[0].removeprefix(f"{path} ")
        raise TurboError(
            f"{path} does not fit this training ({shown(reason, 200)}). Remove it, or take another folder."
        ) from error
    return history


def _packed(history: list) -> torch.Tensor:
    """JSON in bytes: as objects of a pickle, hundreds of thousands of steps are more than a reader that distrusts its
    file takes."""
    return torch.frombuffer(bytearray(json.dumps(history).encode()), dtype=torch.uint8)


def _unpacked(packed: torch.Tensor) -> list:
    history = json.loads(bytes(packed.numpy()))
    if not isinstance(history, list) or not all(
        type(value) in (int, float) for values in history for value in values.values()
    ):
        raise ValueError("its history is none")
    return history
