"""Kernels are proved when a node brings them to a MODEL, for the device that it computes on; never by sampling."""

import pytest
import torch

from tests.helpers.lab import HIGH, QUANT, STOCK, T2V
from tests.helpers.tiny_family import tiny_vae

CPU, SECOND = torch.device("cpu"), torch.device("cpu", 1)  # the second stands for another card


@pytest.fixture
def proved(pack, monkeypatch):
    """Devices that were asked about, in order."""
    devices = []
    for part in ("nodes.host.kernels", "nodes.doctor"):
        monkeypatch.setattr(pack.part(part), "prove", devices.append)
    return devices


def test_turbo_loader_proves_for_files_that_bring_kernels(lab, proved):
    for name, expected in ((T2V, [CPU]), (QUANT, [CPU]), (HIGH, [CPU]), (STOCK, [])):
        proved.clear()
        lab.load(name)
        assert proved == expected, name


@pytest.mark.parametrize("name", [T2V, STOCK])
def test_nodes_that_bring_kernels_prove_for_the_models_device(lab, proved, name):
    for bring in (lab.quantize, lambda model: lab.quantize(model, "row"), lab.attention):
        model = lab.load(name)
        before, model.load_device = model.clone(), SECOND
        proved.clear()
        out = bring(model)
        assert proved == [SECOND] and out.load_device == SECOND
        assert model.callbacks == before.callbacks, "a MODEL that is given stays as it was"


def test_sampling_and_saving_prove_nothing(lab, proved, tmp_path):
    for name in (T2V, STOCK):
        model = lab.attention(lab.quantize(lab.load(name)), 0.5, "int8")
        proved.clear()
        lab.turbo(model, steps=1)
        lab.pack.saving.save_model(model, str(tmp_path / "x.safetensors"))
        assert proved == []


def test_a_copy_on_another_card_is_proved_for_there(lab, proved):
    """As the host makes one for each further card."""
    for model in (lab.load(), lab.attention(lab.quantize(lab.load()), 0.5)):
        proved.clear()
        copy = model.deepclone_multigpu(new_load_device=SECOND)
        assert proved[-1] == SECOND == copy.load_device and proved.count(SECOND) == 1


def test_turbo_doctor_proves_for_the_model_or_the_host(lab, pack, proved):
    model = lab.load()
    proved.clear()
    pack.nodes["TurboDoctor"].execute()
    model.load_device = SECOND
    pack.nodes["TurboDoctor"].execute(model)
    assert proved == [CPU, SECOND]


def test_a_cpu_has_nothing_to_prove(pack):
    found = pack.kernels.prove(CPU)
    assert set(found.values()) == {"no Triton kernels on cpu"}


def test_a_card_that_was_full_is_tried_again_before_the_next_run(lab, proved, pack, monkeypatch):
    """The node's output is kept by the host, so nothing else would ask again in this session."""
    model = lab.attention(lab.load(), 0.5)
    monkeypatch.setattr(pack.part("nodes.host.kernels"), "was_full", lambda device: True)
    proved.clear()
    lab.turbo(model, steps=1)
    assert proved and set(proved) == {CPU}


def test_turbo_vae_proves_the_kernel_of_a_vae(pack, lab, comfy, monkeypatch):
    asked = []
    monkeypatch.setattr(pack.part("nodes.host.vae"), "prove", lambda *given: asked.append(given))
    vae = comfy.sd.VAE(sd=tiny_vae())
    vae.device = SECOND
    pack.nodes["TurboVAE"].execute(vae)
    assert asked == [(SECOND, ("vae",))]
