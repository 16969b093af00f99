"""The tiny diffusion models: published formats, sane activations, the same bytes from the same seed."""

import json

import pytest
import torch
from safetensors import safe_open

from tests.helpers.tiny_dits import STOCK, make_tiny_dits
from turbo_core import checkpoint
from turbo_core.checkpoint.names import PROJ_L
from turbo_core.int8 import quantize_block
from turbo_core.wan import QUANTIZED_LINEARS, WanModel

PUBLISHED = ["TinyWan2.1-T2V", "TinyWan2.2-I2V-high", "TinyWan2.2-I2V-low"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_dits(folder)
    return folder


def raw(path):
    return torch.load(path, weights_only=True)


def test_names(tmp_path):
    paths = make_tiny_dits(tmp_path, 1)
    names = [f"{name}{suffix}.pth" for name in PUBLISHED for suffix in ("", "-quant")] + [STOCK]
    assert [p.name for p in paths] == names
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(names)


def test_same_seed_same_bytes_other_seed_other_weights(tiny, tmp_path):
    for path in make_tiny_dits(tmp_path):
        assert path.read_bytes() == (tiny / path.name).read_bytes()
    make_tiny_dits(tmp_path, seed=5)
    assert (tmp_path / "TinyWan2.1-T2V.pth").read_bytes() != (tiny / "TinyWan2.1-T2V.pth").read_bytes()


@pytest.mark.parametrize("name", PUBLISHED)
def test_layout_of_the_published_files(tiny, name):
    state, quant = raw(tiny / f"{name}.pth"), raw(tiny / f"{name}-quant.pth")
    channels = 16 if "T2V" in name else 36
    assert state["patch_embedding.weight"].shape == quant["patch_embedding.weight"].shape == (256, channels * 4)
    for key, tensor in state.items():
        assert tensor.dtype == (torch.float32 if PROJ_L in key else torch.bfloat16), key
    layers = [f"blocks.{n}.{x}" for n in (0, 1) for x in QUANTIZED_LINEARS]
    for layer in layers:
        q, scale = quantize_block(state[f"{layer}.weight"])
        assert torch.equal(quant[f"{layer}.int8_weight"], q)
        assert torch.equal(quant[f"{layer}.scale"], scale)
        assert f"{layer}.weight" not in quant
    assert all(t.dtype == torch.float32 for k, t in quant.items() if ".norm" in k)
    unchanged = [k for k in state if ".norm" not in k and k.removesuffix(".weight") not in layers]
    assert all(torch.equal(quant[k], state[k]) and quant[k].dtype == state[k].dtype for k in unchanged)


def test_stock_file_is_the_published_one_without_proj_l(tiny):
    state = raw(tiny / "TinyWan2.1-T2V.pth")
    with safe_open(tiny / STOCK, framework="pt") as file:
        stock = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        assert json.loads(file.metadata()["config"])["transformer"] == {"num_heads": 2, "text_dim": 64}
    assert set(stock) == {name for name in state if PROJ_L not in name}
    assert stock["patch_embedding.weight"].shape == (256, 16, 1, 2, 2)
    assert all(torch.equal(t.flatten(), state[name].flatten()) for name, t in stock.items())


@pytest.mark.parametrize("name", PUBLISHED)
@torch.inference_mode()
def test_activations_and_velocity_stay_near_one(tiny, name):
    state, found = checkpoint.load(tiny / f"{name}.pth")
    model = WanModel.from_state_dict(state, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    x, context, image = (
        torch.randn(s, generator=generator) for s in ((1, 16, 3, 16, 16), (1, 8, 64), (1, 20, 3, 16, 16))
    )
    spread = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda _, args, out: spread.append((args[0].std(), out.std(), (out - args[0]).std()))
        )

    def velocity(time, context=context, topk=None):
        image_or_none = image if found.task == "i2v" else None
        return model(x, torch.tensor([time]), context, y=image_or_none, topk=topk)

    early, late = velocity(990.0), velocity(600.0)
    assert all(0.3 < value < 6 for values in spread for value in values)  # every block is felt and none explodes
    assert 0.3 < early.std() < 3
    assert (early - late).std() > 0.05 * early.std()  # the timestep is felt
    assert (early - velocity(990.0, -context)).std() > 0.02 * early.std()  # so is the prompt
    sparse = velocity(990.0, topk=1.0)  # all blocks kept: what differs from dense attention is proj_l
    assert 0.05 * early.std() < (sparse - early).std() < 2 * early.std()
