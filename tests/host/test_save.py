"""Saving with the host's own node and loading again: every bit stays."""

import json

import pytest
import torch
from safetensors import safe_open

from tests.helpers.lab import HIGH, QUANT, STOCK, T2V

NAMES = [T2V, QUANT, HIGH, "TinyWan2.2-I2V-high-quant.pth"]


@pytest.fixture(params=["ModelSave", "TurboSave"])
def saved(request, comfy, lab, tmp_path, monkeypatch):
    """Save a MODEL by the host's node or ours and return the file."""
    import folder_paths
    from comfy_extras.nodes_model_merging import ModelSave

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))

    def save(model):
        if request.param == "ModelSave":
            ModelSave().save(model, "models/saved")
        else:
            lab.pack.nodes["TurboSave"].execute(model, "models/saved")
        return str(max((tmp_path / "models").iterdir(), key=lambda path: path.stat().st_mtime_ns))

    save.prefix = "model.diffusion_model." if request.param == "ModelSave" else ""
    return save


@pytest.mark.parametrize("name", NAMES)
def test_save_and_reload_is_bit_exact(lab, saved, name):
    model = lab.load(name)
    concat = 20 if "I2V" in name else 0
    expected, weights = lab.denoise(model, concat=concat), lab.weights(model)
    again = lab.load(saved(model))
    assert lab.same(lab.weights(again), weights)
    assert torch.equal(lab.denoise(again, concat=concat), expected)
    twice = lab.load(saved(again))
    assert lab.same(lab.weights(twice), weights)


@pytest.mark.parametrize("kind", ["block", "row"])
def test_quantize_save_reload_is_bit_exact(lab, saved, kind):
    model = lab.quantize(lab.load(), kind, layers="feed-forward", skip_blocks="0")
    again = lab.load(saved(model))
    assert lab.same(lab.weights(again), lab.weights(model))
    assert again.get_attachment(lab.pack.loading.SOURCE).format == "mixed"
    # the file's tensors are used where they lie, aligned otherwise, and float32 products may round otherwise
    assert lab.distance(lab.denoise(again), lab.denoise(model)) < 5e-3


def test_row_file_of_a_stock_model_loads_in_the_stock_loader(comfy, lab, saved):
    model = lab.quantize(lab.load(STOCK), "row")
    expected = lab.denoise(model)
    path = saved(model)
    config = {"transformer": {"num_heads": 2, "text_dim": 64}}  # ModelSave does not write it; real sizes need none
    sd, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    metadata = {**(metadata or {}), "config": json.dumps(config)}
    # copies, because float32 products of tensors that lie unaligned in a file may round otherwise
    stock = comfy.sd.load_diffusion_model_state_dict({k: v.clone() for k, v in sd.items()}, metadata=metadata)
    assert torch.equal(lab.denoise(stock), expected)


def test_saved_block_format_says_what_it_is(lab, saved):
    path = saved(lab.load(NAMES[1]))
    with safe_open(path, "pt") as file:
        entry = file.get_tensor(f"{saved.prefix}blocks.0.ffn.0.comfy_quant")
        assert b'"int8_block128"' in bytes(entry.tolist())
        assert file.get_tensor(f"{saved.prefix}blocks.0.ffn.0.weight").dtype == torch.int8


@pytest.mark.parametrize("kind", ["float", "block", "row"])
def test_saving_bakes_a_lora_in(lab, saved, kind):
    model = lab.as_kind(kind)
    with_lora = lab.merged(model, lab.lora(model))
    expected = lab.denoise(with_lora)
    again = lab.load(saved(with_lora))
    assert torch.equal(lab.denoise(again), expected)
    assert lab.distance(expected, lab.denoise(model)) > 0.01


@pytest.mark.parametrize("state", ["never loaded", "low memory", "another LoRA merged"])
@pytest.mark.parametrize("kind", ["block", "row"])
def test_turbo_save_does_not_depend_on_what_is_loaded(lab, tmp_path, kind, state):
    """ModelSave of 0.33 refuses int8 weights that do not lie on the device, which they never do with dynamic VRAM."""
    model = lab.quantize(lab.load(), kind)
    weights = lab.weights(model)
    if state == "low memory":
        model.patch_model(device_to=model.load_device, lowvram_model_memory=1)
    if state == "another LoRA merged":
        lab.loaded(lab.merged(model, lab.lora(model)))
        assert not lab.same(lab.weights(model), weights)
    path = str(tmp_path / "saved.safetensors")
    lab.pack.saving.save_model(model, path)
    assert lab.same(lab.weights(lab.load(path)), weights)


def test_turbo_save_refuses_a_bypass_lora(lab, tmp_path):
    """It lives in the layers' forward, not in the weights: leaving it out would be silent."""
    model = lab.bypassed(lab.load(), lab.lora(lab.load()))
    with pytest.raises(ValueError, match="bypass"):
        lab.pack.saving.save_model(model, str(tmp_path / "saved.safetensors"))
    assert not list(tmp_path.iterdir())


def test_each_turbo_save_knows_its_own_file(lab, tmp_path, monkeypatch):
    """Two of them with one prefix, and one whose prefix comes by a link, of which the host tells nothing."""
    import folder_paths
    from comfy_api.latest import io

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    model, nodes = lab.load(QUANT), {}
    for number in ("1", "2"):
        nodes[number] = type(f"Save{number}", (lab.pack.nodes["TurboSave"],), {})
        nodes[number].hidden = io.HiddenHolder.from_dict({io.Hidden.unique_id: number})
        nodes[number].execute(model, "mine")

    def told():
        return [node.fingerprint_inputs(filename_prefix=prefix) for node in nodes.values() for prefix in ("mine", None)]

    before = told()
    min(tmp_path.iterdir()).unlink()  # the first one's
    now = told()
    assert [one == other for one, other in zip(before, now)] == [False, False, True, True] and told() == now


def test_turbo_save_says_what_it_wrote_and_writes_again_what_was_deleted(lab, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    node, model = lab.pack.nodes["TurboSave"], lab.load(QUANT)
    text = node.execute(model, "here/mine").ui["text"][0]
    (path,) = (tmp_path / "here").iterdir()
    assert text.startswith(f"{path}: {path.stat().st_size / 1e6:.1f} MB") and "int8_block" in text
    before = node.fingerprint_inputs(model=None, filename_prefix="here/mine")
    assert before == node.fingerprint_inputs(filename_prefix="here/mine")
    path.unlink()
    assert node.fingerprint_inputs(filename_prefix="here/mine") != before
