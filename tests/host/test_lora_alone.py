"""LoRAs as turbo_core applies them without ComfyUI, held to ComfyUI's own arithmetic."""

import pytest
import torch

from tests.helpers.lab import QUANT, T2V
from tests.helpers.lora_files import LAYERS, MAKERS, SPELLINGS, spelled
from tests.lora.test_put_on import Loaded, saved
from turbo_core.lora import Lora

STRENGTH = 0.7
KINDS = [kind for kind in MAKERS if kind != "DoRA"] + [name for name, how in SPELLINGS.items() if how[-1]]


@pytest.mark.parametrize("what", KINDS)
def test_float_weights_are_those_of_the_host(comfy, lab, network, tmp_path, what):
    tensors = MAKERS[what](lab, network) if what in MAKERS else spelled(lab, network, what)
    patched = lab.merged(lab.as_kind("float"), tensors, STRENGTH)
    ours = Loaded(lab.path(T2V))
    before = ours.state()
    ours.put_on(Lora(saved(tmp_path, tensors), STRENGTH))
    assert {f"diffusion_model.{name}" for name in ours.changed} == set(patched.patches)
    for key, patches in patched.patches.items():
        name = key.removeprefix("diffusion_model.")
        theirs = comfy.lora.calculate_weight(patches, before[name].clone(), key)
        print(f"{what}, {name}: {lab.distance(ours.state()[name], theirs):.1e} apart")
        torch.testing.assert_close(ours.state()[name], theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_beside_int8_is_the_bypass_of_the_host(lab, network, tmp_path, layer):
    """The host's bypass adapter gives what is added to a linear's output."""
    tensors = {n: t for n, t in MAKERS["LoRA"](lab, network).items() if layer in n}
    [(key, [(_, adapter, *_)])] = lab.merged(lab.as_kind("float"), tensors).patches.items()
    assert key == f"diffusion_model.{layer}.weight"
    ours = Loaded(lab.path(QUANT))
    linear = ours.model.get_submodule(layer)
    x = lab.draw(5, linear.weight.shape[1], seed=3)
    before = linear(x)
    ours.put_on(Lora(saved(tmp_path, tensors), STRENGTH))
    adapter.multiplier = STRENGTH
    torch.testing.assert_close(linear(x), before + adapter.h(x, before), rtol=1e-5, atol=1e-5)
