"""Checkpoints that a training goes on from, and models in several files with an index, damaged or made up."""

import json
from functools import cache
from random import Random

import torch

from tests.hostile import honest
from tests.hostile.archives import packed
from tests.hostile.cases import Case
from tests.hostile.damage import damaged
from tests.hostile.findings import records
from tests.hostile.programs import payload, program
from tests.hostile.states import changed

INDEX = "diffusion_pytorch_model.safetensors.index.json"


def small_parts() -> dict:
    """What the door's training consists of: a model and its optimizer after a step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


@cache
def _good() -> dict:
    history = _bytes('[{"loss": 1.5}, {"loss": 1.25}]')
    return {"parts": {n: p.state_dict() for n, p in small_parts().items()}, "history": history}


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


_ANYTHING = (
    None, 3, -1, 1.5, "x", [], {}, [[]], (1, 2), torch.zeros(0), torch.ones(3), {"x": {}},
    *map(_bytes, ('[{"loss": "x"}]', "{}", "[1]", "[" * 9999)),
)  # fmt: skip


def checkpoint(random: Random) -> Case:
    make = random.random()
    data = honest.pth(_good(), zipped=random.random() < 0.7)
    if make < 0.4:
        return Case("resumed", {"checkpoint.pt": damaged(random, data, random.choice((None, 2500)))})
    if make < 0.6:
        case = random.choice((program, payload))(random)
        name, made = next(iter(case.files.items()))
        return Case("resumed", {"checkpoint.pt": made}, refuse="it is no training's" if name else "")
    if make < 0.7:
        name, content = random.choice((("byteorder", b"big"), (".storage_alignment", b"0")))
        return Case("resumed", {"checkpoint.pt": packed(_replaced(honest.pth(_good()), name, content))})
    state = json_like(_good())
    for _ in range(random.choice((1, 1, 2))):
        _change(random, state)
    return Case("resumed", {"checkpoint.pt": honest.pth(state)})


def json_like(value):
    """A copy whose containers may be changed."""
    if isinstance(value, dict):
        return {key: json_like(item) for key, item in value.items()}
    return [json_like(item) for item in value] if isinstance(value, list) else value


def _change(random, value):
    """One item, however deep, becomes something else, goes, or gets a neighbour."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = random.choice(keys)
        if isinstance(value[key], (dict, list)) and value[key] and random.random() < 0.8:
            value = value[key]
            continue
        kind = random.choice(("other", "other", "gone", "new"))
        if kind == "gone":
            del value[key]
        elif kind == "new" and isinstance(value, dict):
            value[random.choice(("x", "0", 7, 1 << 40))] = random.choice(_ANYTHING)
        else:
            value[key] = random.choice(_ANYTHING)
        return


def _replaced(data, name, content):
    return [(key, content if key.endswith(name) else old) for key, old in records(data)]


def sharded(random: Random) -> Case:
    """An index and two shards, one thing wrong with any of them."""
    state = honest.stock()
    names = list(state)
    random.shuffle(names)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    places = {name: shard for part, shard in zip(parts, shards) for name in part}
    states = [{name: state[name] for name in part} for part in parts]
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    make, refuse = random.choice(("index", "index", "map", "shard", "state", "gone", "swapped", "metadata")), ""
    metadata = [honest.CONFIG, honest.CONFIG]
    if make == "map":
        name = random.choice(names)
        index["weight_map"][random.choice((name, "x", "\x1b[2J", "y" * 3000, ""))] = random.choice(
            (*shards, "../x.safetensors", "/etc/passwd", "", ".", "x.pth", "x\0.safetensors", 3, None, [], {},
             "x" * 300, shards[0].upper(), f"./{shards[0]}")
        )  # fmt: skip
    elif make == "state":
        which = random.randrange(2)
        states[which], _ = changed(random, states[which])
        states[which] = {n: t for n, t in states[which].items() if _writable(n, t)}
    elif make == "metadata":
        metadata[1] = {"config": random.choice(("[", "{}", "x" * 9000, json.dumps({"transformer": 3})))}
    files = {INDEX: json.dumps(index).encode()}
    if make == "index":
        whole = files[INDEX]
        files[INDEX] = random.choice(
            (damaged(random, whole), damaged(random, whole, 60), b"[" * 100_000, b"{}", b"3", b'{"weight_map":{}}')
        )
    for shard, part, meta in zip(shards, states, metadata):
        files[shard] = honest.safetensors(part, meta)
    if make == "shard":
        shard = random.choice(shards)
        files[shard] = damaged(random, files[shard], 4000)
    elif make == "gone":
        del files[random.choice(shards)]
        refuse = "a shard is missing"
    elif make == "swapped":
        files[shards[0]], files[shards[1]] = files[shards[1]], files[shards[0]]
        refuse = "the shards are swapped"
    return Case("checkpoint", files, refuse=refuse)


def _writable(name, tensor):
    return "\ud800" not in name and name != "__metadata__" and tensor.dtype != torch.complex64
