"""Good files in small, as bytes: what the hostile ones are made from."""

import io
import json
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load, save

from tests.helpers.pickles import repacked
from tests.helpers.states import official, plain
from tests.helpers.tiny_dits import _published_quant, tiny_state_dict
from tests.helpers.tiny_family import official_text_names, tiny_tokenizer, tiny_vae
from turbo_core.checkpoint.shapes import Sizes
from turbo_core.checkpoint.write import write_safetensors
from turbo_core.tinywan.text import tiny_text_encoder

# two int8 blocks in ffn.0 and ffn.2; a stock model is known without metadata by heads of 128
SIZES = Sizes(dim=128, in_dim=16, out_dim=16, ffn_dim=136, text_dim=64, freq_dim=16, head_dim=128)
CONFIG = {"config": json.dumps({"transformer": {"num_heads": 1, "text_dim": 64}})}


class Base(NamedTuple):
    """A good file: its name, bytes, tensors as stored, and where their bytes lie, which carry no checksum."""

    name: str
    data: bytes
    state: dict
    places: dict[str, int]

    def with_bytes_of(self, data: bytes) -> dict:
        """The tensors, with the bytes that now lie at their places: what a file of this layout must be read as."""
        state = dict(self.state)
        for name, at in self.places.items():
            like = state[name]
            raw = torch.frombuffer(bytearray(data[at : at + like.nbytes]), dtype=torch.uint8)
            state[name] = raw.view(like.dtype).reshape(like.shape)
        return state


@cache
def model(seed: int = 0) -> dict:
    return tiny_state_dict(seed, SIZES, 1)


@cache
def quantized(seed: int = 0) -> dict:
    return _published_quant(model(seed))


@cache
def stock(seed: int = 0) -> dict:
    return plain(official(model(seed)))


@cache
def encoder() -> dict:
    return tiny_text_encoder(tiny_tokenizer(), 0)


@cache
def official_encoder() -> dict:
    return official_text_names(encoder())


@cache
def spiece() -> bytes:
    return tiny_tokenizer()


@cache
def vae() -> dict:
    return tiny_vae()


def pth(state: dict, zipped: bool = True, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    return file.getvalue()


def safetensors(state: dict, metadata: dict | None = None) -> bytes:
    return save({name: tensor.contiguous().clone() for name, tensor in state.items()}, metadata)


def packed_again(data: bytes, **how) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return repacked(io.BytesIO(data), Path(folder) / "x", **how).read_bytes()


def _ours(state: dict, metadata: dict) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_safetensors(Path(folder) / "x.safetensors", state, metadata)
        return (Path(folder) / "x.safetensors").read_bytes()


def _base(name: str, data: bytes, state: dict) -> Base:
    places = {}
    for key, tensor in state.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if len(raw) >= 16 and data.count(raw) == 1:
            places[key] = data.find(raw)
    return Base(name, data, state, places)


@cache
def zips() -> tuple[Base, ...]:
    new, old = pth(model()), pth(quantized())
    return (
        _base("model.pth", new, model()),
        _base("quant.pth", old, quantized()),
        _base("model.pth", packed_again(new, method=zipfile.ZIP_DEFLATED), model()),
        _base("model.pth", packed_again(new, streamed=True), model()),
        _base("quant.pth", packed_again(old), quantized()),
    )


@cache
def legacy() -> tuple[Base, ...]:
    return tuple(
        _base("old.pth", pth(state, zipped=False, protocol=protocol), state)
        for state in (model(), quantized())
        for protocol in (2, 4)
    )


@cache
def headers() -> tuple[Base, ...]:
    made = {"stock": safetensors(stock(), CONFIG), "turbo": _ours(official(model()), {"format": "pt", **CONFIG})}
    made["fp8"] = safetensors(
        {n: t.to(torch.float8_e4m3fn) if "ffn" in n and t.ndim == 2 else t for n, t in stock().items()}, CONFIG
    )
    return tuple(_base(f"{name}.safetensors", data, load(data)) for name, data in made.items())
