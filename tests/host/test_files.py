"""Files in every spelling and number format, as TurboLoader and TurboSave take them."""

import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers.diffusers_files import INDEX, renamed, repacked, sharded
from tests.helpers.lab import LINEAR, QUANT, STOCK, T2V
from tests.helpers.states import official, plain, saved
from tests.helpers.tiny_dits import TINY, tiny_state_dict, unquantized
from turbo_core import checkpoint
from turbo_core.checkpoint.names import is_quantizable

pytestmark = pytest.mark.host


@pytest.fixture
def state():
    return tiny_state_dict(0)


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_dtypes_of_the_published_file_change_nothing(lab, state, tmp_path, dtype):
    """proj_l, modulation and embeddings in bf16, and the same values in float32."""
    paths = [saved(unquantized(state, rest), tmp_path / f"{rest}.pth") for rest in (torch.bfloat16, torch.float32)]
    ours, theirs = (lab.denoise(lab.load(path, dtype)) for path in paths)
    assert torch.equal(ours, theirs)


WISH = torch.tensor(list(b'[{"attention": "comfy_kitchen_sol", "tau": 1.0}]'), dtype=torch.uint8)
KEY = "blocks.1.self_attn.comfy_attention.config"


class Preference(torch.nn.Module):
    """As newer hosts keep what a file wants of a module's attention: a dict, written to the state dict as bytes."""

    config = None

    def _load_from_state_dict(self, state, prefix, *args):
        entry = state.pop(f"{prefix}config", None)
        self.config = None if entry is None else json.loads(bytes(entry.tolist()))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.config is not None:
            text = json.dumps(self.config).encode()
            destination[f"{prefix}config"] = torch.tensor(list(text), dtype=torch.uint8)


def with_wish(lab, source, folder):
    """A file of the family that names an attention."""
    path = folder / f"wish{source[-4:]}"
    if source.endswith(".pth"):
        torch.save(torch.load(lab.path(source), weights_only=True) | {KEY: WISH}, path)
    else:
        with safe_open(lab.path(source), "pt") as file:
            save_file(load_file(lab.path(source)) | {KEY: WISH}, path := folder / "wish.safetensors", file.metadata())
    return path


@pytest.mark.parametrize("source", [T2V, QUANT, STOCK])
def test_attention_that_a_file_names_is_kept_by_a_host_that_knows_none(lab, tmp_path, source):
    model = lab.load(with_wish(lab, source, tmp_path))
    assert torch.equal(lab.denoise(model), lab.denoise(lab.load(source)))
    model = lab.merged(lab.quantize(model), lab.lora(model))
    lab.pack.saving.save_model(model, str(tmp_path / "saved.safetensors"))
    assert torch.equal(load_file(tmp_path / "saved.safetensors")[KEY], WISH)
    assert lab.load(tmp_path / "saved.safetensors").get_attachment(lab.pack.loading.SOURCE).attention


@pytest.mark.parametrize("source", [T2V, QUANT])
def test_attention_that_a_file_names_reaches_a_host_that_knows_it(comfy, lab, tmp_path, monkeypatch, source):
    from comfy.ldm.wan.model import WanSelfAttention

    init = WanSelfAttention.__init__

    def newer(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.comfy_attention = Preference()

    monkeypatch.setattr(WanSelfAttention, "__init__", newer)
    model = lab.load(with_wish(lab, source, tmp_path))
    blocks = model.model.diffusion_model.blocks
    assert blocks[1].self_attn.comfy_attention.config == json.loads(bytes(WISH.tolist()))
    assert blocks[0].self_attn.comfy_attention.config is None
    lab.pack.saving.save_model(model, str(tmp_path / "saved.safetensors"))
    assert torch.equal(load_file(tmp_path / "saved.safetensors")[KEY], WISH)
    blocks[1].self_attn.comfy_attention.config = None  # as a node may
    lab.pack.saving.save_model(model, str(tmp_path / "without.safetensors"))
    assert KEY not in load_file(tmp_path / "without.safetensors")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The host's folder of models."""
    import folder_paths

    paths = [str(tmp_path)], {".pth", ".safetensors"}
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", paths)
    folder_paths.filename_list_cache.pop("diffusion_models", None)
    yield tmp_path
    folder_paths.filename_list_cache.pop("diffusion_models", None)


def offered(lab, node, name):
    return next(i.options for i in lab.pack.nodes[node].define_schema().inputs if i.id == name)


@pytest.mark.parametrize("kind", ["bf16", "int8_block", "int8_row", "stock"])
def test_a_folder_in_the_diffusers_layout_is_one_entry_and_the_same_model(lab, state, place, kind):
    """Of shards without an index the list shows what is there."""
    state = plain(state) if kind == "stock" else state
    saved(state, place / "official.pth")
    tensors = repacked(state, kind) if "int8" in kind else renamed(state)
    sharded(tensors, place / "TurboWan").rename(place / "index")
    loose = offered(lab, "TurboLoader", "model_name")
    assert len([name for name in loose if "-of-00003" in name]) == 3
    (place / "index").rename(place / "TurboWan" / INDEX)
    for node, name in {"TurboLoader": "model_name", "TurboConvert": "source", "TurboMerge": "turbo"}.items():
        assert sorted(offered(lab, node, name)) == [f"TurboWan/{INDEX}", "official.pth"]
    model = lab.pack.nodes["TurboLoader"].execute(f"TurboWan/{INDEX}")[0]
    before = lab.pack.nodes["TurboLoader"].fingerprint_inputs(model_name=f"TurboWan/{INDEX}")
    assert lab.pack.nodes["TurboLoader"].fingerprint_inputs(model_name=f"TurboWan/{INDEX}") == before
    os.utime(next((place / "TurboWan").glob("*.safetensors")), (1, 1))  # a shard written anew, the index as it was
    assert lab.pack.nodes["TurboLoader"].fingerprint_inputs(model_name=f"TurboWan/{INDEX}") != before
    expected = lab.load(place / "official.pth")
    if "int8" in kind:
        expected = lab.quantize(expected, kind.removeprefix("int8_"))
    assert lab.same(lab.weights(model), lab.weights(expected))
    # tensors of a file are used where they lie, and float32 products of unaligned ones may round otherwise
    assert lab.distance(lab.denoise(model), lab.denoise(expected)) < 5e-3
    assert lab.pack.loading.file_name(model) == "TurboWan"
    done = lab.pack.nodes["TurboConvert"].execute(f"TurboWan/{INDEX}", "bf16")
    assert done[0] == str(place / "TurboWan_bf16.safetensors")
    lab.pack.saving.save_model(model, str(place / "saved.safetensors"))
    assert lab.same(lab.weights(lab.load(place / "saved.safetensors")), lab.weights(model))


def test_a_shard_names_the_index_in_the_node(lab, state, place):
    index = sharded(renamed(state), place / "model")
    index.unlink()
    for name in offered(lab, "TurboLoader", "model_name"):
        with pytest.raises(lab.pack.errors.TurboError, match=f"of 00003: open {INDEX}"):
            lab.pack.nodes["TurboLoader"].execute(name)


@pytest.mark.parametrize("what", ["half of them", "one of another model"])
def test_shards_that_do_not_fit_are_refused_in_the_nodes(lab, state, place, what):
    index = sharded(renamed(state), place / "model")
    second = index.with_name("diffusion_pytorch_model-00002-of-00003.safetensors")
    second.unlink()
    if what != "half of them":
        other = sharded(renamed(tiny_state_dict(5, TINY._replace(ffn_dim=640))), place.parent / f"{place.name}-other")
        shutil.copy(other.with_name(second.name), second)
    before = sorted(place.rglob("*"))
    words = "is not there.*Download" if what == "half of them" else "not of the same model"
    for node, more in {"TurboLoader": (), "TurboConvert": ("bf16",)}.items():
        with pytest.raises(lab.pack.errors.TurboError, match=words):
            lab.pack.nodes[node].execute(f"model/{INDEX}", *more)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("name", ["TurboWan", "stock"])
def test_a_wish_that_nobody_knows_changes_no_result(lab, state, tmp_path, name):
    """An attention of a later year, with keys that no host of today has: carried along."""
    state = state if name == "TurboWan" else plain(state)
    wish = torch.tensor(list(b'{"attention": "of_next_year", "depth": [1, {"x": null}]}'), dtype=torch.uint8)
    model, expected = (lab.load(saved(s, tmp_path / f"{len(s)}.pth")) for s in (state | {KEY: wish}, state))
    assert torch.equal(lab.denoise(model), lab.denoise(expected))
    lab.pack.saving.save_model(model, str(tmp_path / "saved.safetensors"))
    assert torch.equal(load_file(tmp_path / "saved.safetensors")[KEY], wish)


HOST_FORMATS = {  # of newer official files: what an entry says beside the name, and what the layout is asked for
    "int8_tensorwise": ({"convrot": True, "convrot_groupsize": 256}, {"per_channel": True, "convrot": True}),
    "nvfp4": ({}, {}),
    "mxfp8": ({}, {}),
    "convrot_w4a4": ({"convrot_groupsize": 256}, {}),
    "asym_w4a8_int8": ({"group_size": 16, "convrot_groupsize": 256}, {}),
}


def by_the_host(state, kind):
    """A state whose ten linears a block are in a format of the host's own."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    if kind not in QUANT_ALGOS:
        pytest.skip(f"this host has no {kind}")
    says, asked = HOST_FORMATS[kind]
    entry = torch.tensor(list(json.dumps({"format": kind, **says}).encode()), dtype=torch.uint8)
    result = {}
    for name, tensor in official(state).items():
        if is_quantizable(name):
            quantized = QuantizedTensor.from_float(tensor.float(), QUANT_ALGOS[kind]["comfy_tensor_layout"], **asked)
            result |= quantized.state_dict(name) | {f"{name.removesuffix('weight')}comfy_quant": entry.clone()}
        else:
            result[name] = tensor
    return {name: tensor.contiguous() for name, tensor in result.items()}


def host_file(lab, state, kind, path):
    with safe_open(lab.path(STOCK), "pt") as file:
        save_file(by_the_host(state, kind), path, file.metadata())
    return str(path)


@pytest.mark.parametrize("kind", HOST_FORMATS)
def test_stock_files_in_the_hosts_own_formats_are_loaded_by_the_host(comfy, lab, state, tmp_path, kind, caplog):
    """And everything that the log says is possible with the MODEL is."""
    path = host_file(lab, plain(state), kind, tmp_path / "x.safetensors")
    with caplog.at_level("INFO"):
        model = lab.load(path)
    assert f"quantized as {kind}" in caplog.text and "TurboConvert and TurboMerge do not read" in caplog.text
    result = lab.denoise(model)
    assert torch.equal(result, lab.denoise(comfy.sd.load_diffusion_model(path)))
    assert lab.distance(result, lab.denoise(lab.load(STOCK))) < 0.4
    assert lab.denoise(lab.attention(model, mode="sparse only")).isfinite().all()
    changed = lab.merged(model, lab.lora(model))
    assert lab.distance(lab.denoise(changed), result) > 0.01
    # w4a4 rounds what goes into a layer to four bits as well, W8A8 does not
    assert lab.distance(lab.denoise(lab.quantize(lab.load(path))), result) < (0.2 if kind == "convrot_w4a4" else 0.1)
    lab.pack.saving.save_model(lab.load(path), str(tmp_path / "saved.safetensors"))
    again = lab.load(tmp_path / "saved.safetensors")
    assert again.get_attachment(lab.pack.loading.SOURCE).format == model.get_attachment(lab.pack.loading.SOURCE).format
    assert lab.same(lab.weights(again), lab.weights(lab.load(path)))
    assert lab.distance(lab.denoise(again), result) < 5e-3


@pytest.mark.parametrize("kind", HOST_FORMATS)
def test_turbowan_files_in_the_hosts_own_formats_are_told_what_to_do(lab, state, tmp_path, kind):
    """The host's loader would read them, without proj_l."""
    path = host_file(lab, state, kind, tmp_path / "x.safetensors")
    for call in (lab.load, checkpoint.load, lambda p: checkpoint.convert(p, tmp_path / "y.safetensors", "bf16")):
        with pytest.raises(ValueError, match=f"quantized as '{kind}.*published file.*turbo-core convert"):
            call(path)
    found = checkpoint.inspect(path)
    assert found.format.startswith(kind) and found.has_sla and kind in found.notes[-1]
    assert (found.dim, found.ffn_dim, found.text_dim, found.in_dim) == (256, 512, 64, 16)


def test_a_format_of_a_newer_host_is_told_apart_from_a_fault(lab, state, tmp_path):
    path = tmp_path / "x.safetensors"
    entry = torch.tensor(list(b'{"format": "w6a8_of_tomorrow"}'), dtype=torch.uint8)
    with safe_open(lab.path(STOCK), "pt") as file:
        save_file(official(plain(state)) | {"blocks.0.ffn.0.comfy_quant": entry}, path, file.metadata())
    with pytest.raises(lab.pack.errors.TurboError, match=r"w6a8_of_tomorrow, which this ComfyUI does not load.*Update"):
        lab.load(path)


@pytest.mark.parametrize("shape", ["rows", "one"])
def test_scales_in_other_shapes_that_the_host_computes_with(lab, place, monkeypatch, shape):
    """It multiplies by [N] along the rows and dequantizes along the columns: square layers came out 13 % wrong."""
    import folder_paths

    layers, whole = {}, {}
    for name, tensor in load_file(lab.path(STOCK)).items():
        if not is_quantizable(name.removeprefix("model.diffusion_model.")):
            layers[name] = whole[name] = tensor
            continue
        magnitudes = tensor.float().abs()
        scale = (magnitudes.amax(1, keepdim=True) if shape == "rows" else magnitudes.amax()) / 127
        entry = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
        layers[name] = (tensor.float() / scale).round().to(torch.int8)
        layers[name.removesuffix("weight") + "comfy_quant"] = entry
        layers[f"{name}_scale"] = scale.flatten() if shape == "rows" else scale
        whole[name] = (layers[name] * scale).to(tensor.dtype)
    with safe_open(lab.path(STOCK), "pt") as file:
        metadata = file.metadata()
    save_file(layers, place / "int8.safetensors", metadata)
    save_file(whole, place / "float.safetensors", metadata)
    save_file(lab.lora(lab.load(STOCK), LINEAR), place / "lora.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(place)], {".safetensors"}))
    expected = lab.load(place / "float.safetensors")
    for model in (lab.load(place / "int8.safetensors"), comfy_loader(place / "int8.safetensors")):
        again = lab.quantize(model, "block")
        assert lab.distance(lab.denoise(again), lab.denoise(lab.quantize(expected, "block"))) < 0.03
        text, patched = lab.pack.nodes["TurboLoraReport"].execute(model, "lora.safetensors").result
        assert "2 of 2 tensors act" in text
        lora = load_file(place / "lora.safetensors")
        assert lab.distance(lab.denoise(patched), lab.denoise(lab.merged(expected, lora))) < 0.05


def comfy_loader(path):
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(path))
