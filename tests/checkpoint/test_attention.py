"""Attention that a file names for modules: told, kept out of the network, carried along bit for bit."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.states import official, plain, same, saved
from turbo_core import checkpoint
from turbo_core.checkpoint.formats import FORMATS
from turbo_core.checkpoint.others.comfyui import attention_tensors
from turbo_core.wan import WanModel

MODULE = "blocks.1.self_attn"
KEY = f"{MODULE}.comfy_attention.config"
SOL = [{"attention": "comfy_kitchen_sol", "tau": 1.0}, {"attention": "comfy_kitchen_int8"}]


def encoded(content) -> torch.Tensor:
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    return torch.tensor(list(content), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"attention": "comfy_kitchen_int8"}, "1 modules.*comfy_kitchen_int8$"),
        (SOL, "comfy_kitchen_sol, then comfy_kitchen_int8"),
        ({"attention": "of_tomorrow", "x": [1]}, "unknown.*of_tomorrow"),
        ([SOL[0], 3], "unknown"),
        ([], "unknown"),
        (7, "unknown: 7"),
        (b"{not json", "unknown: {not json"),
        (b"[" * 4000, "unknown"),
        (b"\xff\xfe\x00\x1b", "unknown"),
        (b"", "unknown"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_any_content_is_told_and_carried(tmp_path, state, content, told, suffix):
    state[KEY] = encoded(content)
    path = saved(state, tmp_path / f"x{suffix}")
    found = checkpoint.inspect(path)
    assert re.search(told, found.notes[-1])
    assert torch.equal(attention_tensors(found.attention)[KEY], state[KEY])
    loaded, _ = checkpoint.load(path)
    assert same(loaded, official({n: t for n, t in state.items() if n != KEY}))
    checkpoint.convert(path, tmp_path / "y.safetensors", "int8_block")
    assert torch.equal(load_file(tmp_path / "y.safetensors")[KEY], state[KEY])
    assert checkpoint.inspect(tmp_path / "y.safetensors").attention == found.attention


@pytest.mark.parametrize(
    "tensor", [torch.zeros(5000, dtype=torch.uint8), torch.full((3,), torch.nan), torch.ones(2).char()]
)
def test_what_is_no_text_is_told_and_converted(tmp_path, state, tensor):
    state[KEY] = tensor
    path = saved(state, tmp_path / "x.safetensors")
    found = checkpoint.inspect(path)
    assert "unknown" in found.notes[-1] and found.attention == {}
    checkpoint.convert(path, tmp_path / "y.safetensors", "fp16")
    written = load_file(tmp_path / "y.safetensors")[KEY]
    assert written.dtype == tensor.dtype and written.numpy().tobytes() == tensor.numpy().tobytes()


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_carries_it(tmp_path, state, format):
    state[KEY] = encoded(SOL)
    path = saved({f"model.diffusion_model.{n}": t for n, t in state.items()}, tmp_path / "x.safetensors")
    checkpoint.convert(path, tmp_path / "y.safetensors", format)
    assert torch.equal(load_file(tmp_path / "y.safetensors")[KEY], encoded(SOL))


def test_the_network_is_built_without_it(tmp_path, state):
    network = WanModel.from_state_dict(checkpoint.load(saved(state | {KEY: encoded(SOL)}, tmp_path / "x.pth"))[0])
    assert not [name for name in network.state_dict() if "comfy" in name]


def test_a_merge_keeps_that_of_the_finetune(tmp_path, state):
    base = plain(state)
    files = {
        "finetune": base | {KEY: encoded(SOL), "blocks.0.self_attn.comfy_attention.config": encoded(b"?")},
        "base": base | {KEY: encoded({"attention": "comfy_kitchen_int8"})},
        "turbo": state | {"blocks.0.cross_attn.comfy_attention.config": encoded(SOL)},
    }
    paths = {name: saved(content, tmp_path / f"{name}.pth") for name, content in files.items()}
    target = tmp_path / "out.safetensors"
    checkpoint.merge(paths["finetune"], paths["base"], [paths["turbo"]], target)
    kept = {n: t for n, t in load_file(target).items() if "comfy_attention" in n}
    assert kept.keys() == {KEY, "blocks.0.self_attn.comfy_attention.config"}
    assert torch.equal(kept[KEY], encoded(SOL))
