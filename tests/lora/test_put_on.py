"""LoRAs on a model: float weights take the sum, int8 weights stay and get a product beside them, off bit for bit."""

from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from tests.helpers.lab import Lab
from tests.helpers.lora_files import LAYERS, MAKERS, SPELLINGS, factors, spelled
from turbo_core import checkpoint
from turbo_core.lora import Library, Lora, put_on
from turbo_core.wan import WanModel

FLOAT, QUANT = "TinyWan2.1-T2V.pth", "TinyWan2.1-T2V-quant.pth"
LAB = SimpleNamespace(draw=Lab.draw)


class Loaded:
    """A model, its file, and what puts LoRAs on it as a pipeline does."""

    def __init__(self, path):
        self.file = checkpoint.opened(path)
        self.library, self.changed = Library([self.file]), frozenset()
        self.model = WanModel.from_state_dict(checkpoint.weights(self.file), torch.float32)

    def put_on(self, *loras):
        acting = self.library.acting(loras, 0)
        self.changed = put_on(self.model, acting, self.changed, self.original)

    def original(self, names):
        state = checkpoint.weights(self.file)
        return ((name, state[name]) for name in names)

    def state(self):
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def velocity(self):
        x = LAB.draw(1, 16, 2, 8, 10, seed=5)
        return self.model(x, torch.tensor([900.0]), LAB.draw(1, 512, 64, seed=6))


@pytest.fixture(scope="module")
def plain(tiny):
    return Loaded(tiny / FLOAT)


@pytest.fixture(scope="module")
def quant(tiny):
    return Loaded(tiny / QUANT)


def saved(tmp_path, tensors, name="lora.safetensors"):
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name)
    return tmp_path / name


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_sum_in_float64_and_comes_off_bit_for_bit(plain, tmp_path, spelling):
    before = plain.state()
    tensors = spelled(LAB, plain.model, spelling)
    plain.put_on(Lora(saved(tmp_path, tensors), -0.7))
    scale = -0.7 * (2 if any(name.endswith("alpha") for name in tensors) else 1)
    assert plain.changed == {f"{layer}.weight" for layer in LAYERS}
    for layer in LAYERS:
        down, up = (half.double() for half in factors(LAB, layer, plain.model))
        exact = before[f"{layer}.weight"].double() + scale * up @ down
        torch.testing.assert_close(
            plain.model.get_submodule(layer).weight.double(), exact, rtol=1e-6, atol=1e-7, check_dtype=False
        )
    plain.put_on()
    assert same(plain.state(), before) and not plain.changed


def test_two_at_once_and_another_in_their_place(plain, tmp_path):
    one = saved(tmp_path, spelled(LAB, plain.model, "kohya"), "one.safetensors")
    two = saved(tmp_path, MAKERS["diff"](LAB, plain.model), "two.safetensors")
    before = plain.state()
    plain.put_on(Lora(two))
    alone = plain.state()
    plain.put_on(Lora(one, 0.5), Lora(two))
    both, name = plain.state(), f"{LAYERS[0]}.weight"
    down, up = factors(LAB, LAYERS[0], plain.model)
    torch.testing.assert_close(both[name] - alone[name], 0.5 * 2 * up @ down, rtol=1e-4, atol=1e-6)
    plain.put_on(Lora(two))
    assert same(plain.state(), alone) and not same(alone, before)
    norm = "blocks.0.norm3.bias"
    torch.testing.assert_close(alone[norm] - before[norm], LAB.draw(256, seed=41) * 0.1, rtol=1e-4, atol=1e-6)
    plain.put_on(Lora(one, 0.0))
    assert same(plain.state(), before)


@pytest.mark.parametrize("what", ["LoRA", "diff"])
def test_int8_weights_stay_and_the_product_is_beside_them(quant, tmp_path, what):
    state, before = quant.state(), quant.velocity()
    lora = Lora(saved(tmp_path, MAKERS[what](LAB, quant.model)), 1.5)
    quant.put_on(lora)
    x = LAB.draw(3, 256, seed=9)
    layer = quant.model.get_submodule(LAYERS[0])
    down, up = (half.double() for half in factors(LAB, LAYERS[0], quant.model))
    with_lora = layer(x)
    beside, layer.beside, bias = layer.beside, (), layer.bias
    layer.bias = state[f"{LAYERS[0]}.bias"]
    scale = 2 if what == "diff" else 1  # alpha over rank, in that spelling
    expected = layer(x).double() + 1.5 * scale * x.double() @ down.T @ up.T
    layer.beside, layer.bias = beside, bias
    expected += 1.5 * LAB.draw(256, seed=30).double() * 0.1 if what == "diff" else 0
    torch.testing.assert_close(with_lora.double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(quant.velocity(), before, atol=0.05)
    assert all(torch.equal(t, state[name]) for name, t in quant.model.state_dict().items() if t.dtype == torch.int8)
    assert not quant.model.blocks[0].is_int8(), "the fused block would leave out what is beside the weights"
    assert quant.library.bytes([lora], 0, 2) > 0
    quant.put_on(lora._replace(strength=0.0))
    assert same(quant.state(), state) and torch.equal(quant.velocity(), before) and quant.model.blocks[0].is_int8()


@pytest.mark.parametrize("what", ["LoRA", "LoHa", "LoKr", "LoKr, full"])
def test_every_kind_beside_int8_adds_what_it_adds_to_a_float_weight(plain, quant, tmp_path, what):
    lora = Lora(saved(tmp_path, MAKERS[what](LAB, plain.model)), 0.5)
    x = {name: LAB.draw(5, plain.model.get_submodule(name).weight.shape[1], seed=3) for name in LAYERS}
    layers = [quant.model.get_submodule(name) for name in LAYERS]
    weights = {name: plain.model.get_submodule(name).weight.double() for name in LAYERS}
    before = [layer(x[name]) for name, layer in zip(LAYERS, layers)]
    for loaded in (plain, quant):
        loaded.put_on(lora)
    for name, layer, without in zip(LAYERS, layers, before):
        added = x[name].double() @ (plain.model.get_submodule(name).weight.double() - weights[name]).T
        assert added.abs().max() > 0.05
        torch.testing.assert_close((layer(x[name]) - without).double(), added, rtol=1e-3, atol=2e-5)
    held = sum(part.numel() for layer in layers for pair in layer.beside for part in pair if part is not None)
    assert quant.library.bytes([lora], 0, 4) >= 4 * held > 0
    for loaded in (plain, quant):
        loaded.put_on()


def test_beside_int8_is_near_the_merged_float_model(plain, quant, tmp_path):
    """The same LoRA on both: as far apart as the two models are without it."""
    lora = Lora(saved(tmp_path, MAKERS["LoRA"](LAB, plain.model)))
    apart = (quant.velocity() - plain.velocity()).norm()
    changed = plain.velocity()
    for loaded in (plain, quant):
        loaded.put_on(lora)
    assert (quant.velocity() - plain.velocity()).norm() < 1.5 * apart < 0.5 * (plain.velocity() - changed).norm()
    for loaded in (plain, quant):
        loaded.put_on()


def test_what_was_kept_of_the_text_is_made_again(plain, tmp_path):
    edition = plain.model.edition
    plain.put_on(Lora(saved(tmp_path, spelled(LAB, plain.model, "PEFT"))))
    assert plain.model.edition > edition
    plain.put_on()
