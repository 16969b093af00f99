"""TurboConvert and TurboMerge in the real host, and fp8 files in the host's own loader."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_dits import STOCK
from turbo_core import checkpoint
from turbo_core.checkpoint.formats import FORMATS
from turbo_core.checkpoint.names import PROJ_L


@pytest.fixture
def models(lab, tmp_path, monkeypatch):
    """models/unet and models/diffusion_models with tiny files, as the host's file lists see them."""
    import folder_paths

    folders = [tmp_path / "unet", tmp_path / "diffusion_models"]
    for folder in folders:
        folder.mkdir()
    for name in ("TinyWan2.1-T2V.pth", "TinyWan2.1-T2V-quant.pth", STOCK):
        shutil.copy(lab.path(name), folders[0] / name)
    paths = [str(folder) for folder in folders]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", (paths, {".pth", ".safetensors"}))
    folder_paths.filename_list_cache.pop("diffusion_models", None)
    yield tmp_path
    folder_paths.filename_list_cache.pop("diffusion_models", None)


@pytest.fixture
def convert(pack):
    return lambda *args, **kwargs: pack.nodes["TurboConvert"].execute(*args, **kwargs)


@pytest.fixture
def bar(comfy, monkeypatch):
    """What the page is told about progress."""
    calls = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, *_, **__: calls.append((done, total)))
    return calls


def written(models):
    return sorted(path.name for path in (models / "diffusion_models").iterdir())


def test_converts_as_the_command_does_and_loaders_list_the_file(models, convert, bar, tmp_path, lab):
    import folder_paths

    before = folder_paths.get_filename_list("diffusion_models")
    done = convert("TinyWan2.1-T2V.pth", "int8_block")
    target = models / "diffusion_models" / "TinyWan2.1-T2V_int8_block.safetensors"
    assert done[0] == str(target)
    same = checkpoint.convert(lab.path("TinyWan2.1-T2V.pth"), tmp_path / "same.safetensors", "int8_block").path
    assert target.read_bytes() == (tmp_path / "same.safetensors").read_bytes(), same
    assert bar[-1][0] == bar[-1][1] > 0
    assert str(target) in done.ui["text"][0]
    assert set(folder_paths.get_filename_list("diffusion_models")) - set(before) == {target.name}
    lab.load(done[0])


def test_published_file_without_quantization_loads_in_every_format(models, convert, lab):
    reference = lab.denoise(lab.dense(lab.load()))
    for format in FORMATS:
        model = lab.load(convert("TinyWan2.1-T2V.pth", format)[0])
        apart = lab.distance(lab.denoise(lab.dense(model)), reference)
        print(format, apart)
        assert apart < {"fp32": 1e-5, "bf16": 1e-5, "fp16": 1e-3}.get(format, 0.1)


def test_fp8_loads_in_the_host_s_own_loader_as_fp8(models, convert, comfy, lab):
    path = convert(STOCK, "fp8")[0]
    model = comfy.sd.load_diffusion_model(path)
    linear = model.model.diffusion_model.blocks[1].ffn[0]
    assert linear.quant_format == "float8_e4m3fn"
    raw, name = load_file(path), "blocks.1.ffn.0.weight"
    assert linear.weight._qdata.dtype == torch.float8_e4m3fn
    assert torch.equal(linear.weight.dequantize().float(), raw[name].float() * raw[f"{name}_scale"])
    apart = lab.distance(lab.denoise(model), lab.denoise(comfy.sd.load_diffusion_model(lab.path(STOCK))))
    print("fp8 in the host", apart)
    assert 1e-4 < apart < 0.1
    ours = lab.load(path)  # no proj_l: handed to the host's loader as well
    assert lab.difference(lab.denoise(ours), lab.denoise(model)) < 1e-6


def test_nothing_is_overwritten_unless_asked(models, pack, convert):
    first = convert("TinyWan2.1-T2V.pth", "bf16", "mine")
    assert first[0].endswith("mine.safetensors")
    before = load_file(first[0])
    with pytest.raises(ValueError, match=r"mine\.safetensors exists already.*overwrite"):
        convert("TinyWan2.1-T2V.pth", "int8_row", "mine.safetensors")
    after = load_file(first[0])
    assert all(torch.equal(before[name], after[name]) for name in before)
    convert("TinyWan2.1-T2V.pth", "int8_row", "mine", overwrite=True)
    assert checkpoint.inspect(first[0]).format == "int8_row"
    with pytest.raises(ValueError, match="the source itself"):
        convert("mine.safetensors", "bf16", "mine", overwrite=True)


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/../../escaped", "missing/folder"])
def test_files_go_below_the_folder_only(models, convert, name):
    with pytest.raises(ValueError, match=r"lies outside|no folder"):
        convert("TinyWan2.1-T2V.pth", "bf16", name)
    assert written(models) == []


def test_source_that_is_gone_or_not_a_model(models, convert):
    with pytest.raises(ValueError, match=r"gone\.pth was not found"):
        convert("gone.pth", "bf16")
    (models / "unet" / "broken.safetensors").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="web page"):
        convert("broken.safetensors", "bf16")
    assert written(models) == []


def test_interrupt_stops_the_conversion_and_leaves_nothing(models, convert, comfy, monkeypatch):
    management = comfy.model_management

    def half(done, total, *_, **__):
        if done > total / 2:
            management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", half)
    with pytest.raises(management.InterruptProcessingException):
        convert("TinyWan2.1-T2V.pth", "int8_block")
    assert written(models) == []
    assert not management.processing_interrupted()
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", None)
    convert("TinyWan2.1-T2V.pth", "int8_block")  # the next run is not affected
    assert written(models) == ["TinyWan2.1-T2V_int8_block.safetensors"]


def test_merge_node_accelerates_a_finetune(models, pack, lab, bar):
    base = load_file(models / "unet" / STOCK)
    generator = torch.Generator().manual_seed(1)
    finetune = {n: (t + 0.01 * torch.randn(t.shape, generator=generator)).to(t.dtype) for n, t in base.items()}
    metadata = {"config": checkpoint.inspect(models / "unet" / STOCK).metadata["config"]}
    save_file(finetune, models / "unet" / "finetune.safetensors", metadata)
    node = pack.nodes["TurboMerge"]
    done = node.execute("finetune.safetensors", STOCK, "TinyWan2.1-T2V.pth", 1.0, "bf16")
    assert done[0] == str(models / "diffusion_models" / "finetune_turbo_bf16.safetensors")
    assert bar[-1][0] == bar[-1][1]
    text = done.ui["text"][0]
    assert f"TinyWan2.1-T2V.pth: 0.00% from {STOCK}" in text and "add nothing" in text
    merged = load_file(done[0])  # the tiny stock file is the accelerated one without proj_l: only that is added
    assert torch.equal(merged["blocks.0.ffn.0.weight"], finetune["blocks.0.ffn.0.weight"])
    assert f"blocks.1.{PROJ_L}.weight" in merged
    model = lab.load(done[0])
    assert pack.blocks.has_trained_sla(model.model.diffusion_model)
    assert torch.isfinite(lab.denoise(model)).all()
    with pytest.raises(ValueError, match="without -quant"):
        node.execute("finetune.safetensors", STOCK, "TinyWan2.1-T2V-quant.pth", 1.0, "bf16", "x")
    assert "x.safetensors" not in written(models)


def test_schemas_offer_every_format(pack):
    module = pack.part("nodes.convert")
    for node in module.NODES:
        inputs = {given.id: given for given in node.define_schema().inputs}
        assert inputs["format"].options == list(FORMATS) and all(given.tooltip for given in inputs.values())
        assert node.define_schema().is_output_node


@pytest.mark.parametrize("node", ("TurboConvert", "TurboMerge"))
def test_a_file_that_is_deleted_is_made_again(models, pack, node):
    """The host keeps a node's results while its inputs are the same: they are not the same without the file."""
    shutil.copy(models / "unet" / STOCK, models / "unet" / "finetune.safetensors")
    files = {"finetune": "finetune.safetensors", "base": STOCK, "turbo": "TinyWan2.1-T2V.pth", "strength": 1.0}
    inputs = {"source": "TinyWan2.1-T2V.pth"} if node == "TurboConvert" else files
    inputs |= {"format": "bf16", "filename": "mine again", "overwrite": False}
    node = pack.nodes[node]
    before = node.fingerprint_inputs(**inputs)
    path = node.execute(**inputs)[0]
    assert node.fingerprint_inputs(**inputs) == before, "a second run would ask to overwrite the file"
    os.remove(path)
    gone = node.fingerprint_inputs(**inputs)
    assert gone != before and node.fingerprint_inputs(**inputs) == gone
    assert node.execute(**inputs)[0] == path
    assert node.fingerprint_inputs(**inputs) == gone
    source = models / "unet" / "TinyWan2.1-T2V.pth"
    os.utime(source, (1, 1))  # another source under the same name
    assert node.fingerprint_inputs(**inputs) != gone
    assert node.fingerprint_inputs(source=None) == node.fingerprint_inputs(source=["7", 0])  # links
    node.execute(**inputs | {"filename": "by a link"})
    linked = inputs | {"filename": None}  # as the host says of a link
    before = node.fingerprint_inputs(**linked)
    assert node.fingerprint_inputs(**linked) == before
    os.remove(path.replace("mine again", "by a link"))
    assert node.fingerprint_inputs(**linked) != before
