"""Wrong files and impossible names: an error that names culprit and cure, no file left, and a host that goes on."""

import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.lab import QUANT, STOCK, T2V
from tests.hostile.archives import packed


@pytest.fixture
def loading(lab, monkeypatch, tmp_path):
    """Load a file of models/diffusion_models through the node itself."""
    import folder_paths

    places = [str(tmp_path)], {".pth", ".safetensors"}
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", places)
    return lambda name: lab.pack.nodes["TurboLoader"].execute(name)[0]


def changed(lab, tmp_path, name, change, source=QUANT):
    sd = torch.load(lab.path(source), weights_only=True)
    change(sd)
    torch.save(sd, tmp_path / name)


class Evil:
    def __reduce__(self):
        return os.system, ("touch " + Evil.target,)


def flux(lab, folder):
    names = "double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"
    save_file({name: torch.zeros(9, 3) for name in names}, folder / "bad.safetensors")


def truncated(lab, folder):
    data = (lab.tiny / T2V).read_bytes()
    (folder / "bad.pth").write_bytes(data[: len(data) // 2])


def truncated_safetensors(lab, folder):
    data = (lab.tiny / STOCK).read_bytes()
    (folder / "bad.safetensors").write_bytes(data[: len(data) // 2])


def malicious(lab, folder):
    Evil.target = str(folder / "ran")
    (folder / "bad.pth").write_bytes(pickle.dumps({"head.modulation": Evil()}))


def malicious_zip(lab, folder):
    Evil.target = str(folder / "ran")
    torch.save({"head.modulation": torch.zeros(1), "x": Evil()}, folder / "bad.pth")


def missing_keys(lab, folder):
    changed(lab, folder, "bad.pth", lambda sd: [sd.pop(k) for k in list(sd) if "blocks.1.ffn" in k])


def missing_scale(lab, folder):
    changed(lab, folder, "bad.pth", lambda sd: sd.pop("blocks.0.ffn.0.scale"))


def wrong_scale(lab, folder):
    changed(lab, folder, "bad.pth", lambda sd: sd.update({"blocks.0.ffn.0.scale": torch.ones(3, 5)}))


def nan_scale(lab, folder):
    changed(lab, folder, "bad.pth", lambda sd: sd["blocks.0.ffn.0.scale"].fill_(float("nan")))


def one_expert_of_another_size(lab, folder):
    changed(lab, folder, "bad.pth", lambda sd: sd.update({"blocks.0.ffn.0.bias": torch.ones(100)}))


def half_the_projections(lab, folder):
    changed(lab, folder, "bad.pth", lambda sd: [sd.pop(k) for k in list(sd) if "blocks.1" in k and "proj_l" in k])


def text_encoder(lab, folder):
    shutil.copy(lab.path("tiny_umt5_enc.pth"), folder / "bad.pth")


def the_vae(lab, folder):
    shutil.copy(lab.path("TinyWan2.1_VAE.pth"), folder / "bad.pth")


def empty(lab, folder):
    (folder / "bad.pth").write_bytes(b"")


BAD = {
    flux: "Flux",
    truncated: "cut short",
    truncated_safetensors: "cut short",
    malicious: "refused|not a PyTorch file",
    malicious_zip: "refused",
    missing_keys: "blocks.1.ffn",
    missing_scale: "blocks.0.ffn.0",
    wrong_scale: r"\[3, 5\].*\[4, 2\]",
    nan_scale: "blocks.0.ffn.0.*NaN",
    one_expert_of_another_size: r"blocks.0.ffn.0.bias.*\[100\].*\[512\]",
    half_the_projections: "proj_l",
    text_encoder: "umT5",
    the_vae: "VAE",
    empty: "checkpoint",
}


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__)
def test_bad_files_are_named_and_the_host_goes_on(lab, healthy, loading, tmp_path, make):
    make(lab, tmp_path)
    name = next(path.name for path in tmp_path.iterdir() if path.name.startswith("bad"))
    with pytest.raises(lab.pack.errors.TurboError, match=BAD[make]) as caught:
        loading(name)
    print(caught.value)
    assert name in str(caught.value)
    assert not (tmp_path / "ran").exists(), "code in the file has run"
    assert healthy()


def test_missing_file(lab, loading):
    """Removed between the listing and the run."""
    with pytest.raises(lab.pack.errors.TurboError, match=r"gone\.pth was not found.*press R"):
        loading("gone.pth")
    with pytest.raises(lab.pack.errors.TurboError, match="does not exist"):
        lab.load("/nowhere/gone.pth")


def test_weights_that_are_not_finite(lab, healthy):
    """Quantizing names the layer; nothing of the failed run is left on the model."""
    for value in (float("nan"), float("inf")):
        model = lab.load()
        model.model.diffusion_model.blocks[1].ffn[2].weight[3, 5] = value
        with pytest.raises(lab.pack.errors.TurboError, match=r"blocks.1.ffn.2.weight holds NaN"):
            lab.quantize(model)
        lab.quantize(model, skip_blocks="1")
    assert healthy()


def test_disk_full_while_saving(lab, tmp_path, monkeypatch):
    """A clear error and no half-written file."""
    stream = lab.pack.saving.stream_safetensors.__globals__
    usage = stream["shutil"].disk_usage(tmp_path)
    monkeypatch.setattr(stream["shutil"], "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(lab.pack.errors.TurboError, match="disk has"):
        lab.pack.saving.save_model(lab.load(), str(tmp_path / "x.safetensors"))
    assert not list(tmp_path.iterdir())


FORBIDDEN = ["a:b", "C:x", "a<b", "a>b", "a|b", 'a"b', "a?b", "a*b", "a\nb", "a\x00b", "%date:yyyy-MM-dd%"]
NAMES = (
    dict.fromkeys(FORBIDDEN, "does not allow in file names.*leave it out")
    | dict.fromkeys(["CON", "con.safetensors", "a/NUL.x/b", "LPT1/x", "Com9 .x"], "keeps for a device: choose another")
    | dict.fromkeys(["x.", "a /b", "a./b"], "ends in a dot or a space.*leave it out")
    | dict.fromkeys(["a/", "/", ".", "..", "a/..", " . "], "names no file: write a name")
    | dict.fromkeys(["../x", "a/../../x", "/tmp/x"], "lies outside.*Expected a file name")
    | {"x" * 300: "too long.*shorter", "한" * 90: "too long.*shorter"}
)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
@pytest.mark.parametrize("node", ["TurboConvert", "TurboMerge", "TurboSave"])
def test_names_that_some_system_cannot_store(refused, node, name):
    refused(node, NAMES[name], **{"filename_prefix" if node == "TurboSave" else "filename": name})


@pytest.mark.parametrize("name", ["한글 이름", "v1.2", " padded ", ".hidden", "a/../b", "console", "COM10"])
def test_names_that_are_fine(lab, given, place, name):
    lab.pack.nodes["TurboSave"].execute(given["t2v"], name)
    lab.pack.nodes["TurboConvert"].execute(T2V, "bf16", name)
    assert len([path for path in place.rglob("*") if path.is_file()]) == 4


@pytest.mark.skipif(os.sep == "\\", reason="there a backslash separates folders")
def test_backslash_is_no_separator_here(refused):
    refused("TurboConvert", r"separated by /", filename="..\\x")


@pytest.mark.parametrize("name", ["gone.pth", "../../gone.pth", "/etc/passwd", ".", "a\x00b"])
def test_files_that_are_gone(refused, name):
    for node, given in {
        "TurboLoader": "model_name",
        "TurboTextEncoderLoader": "text_encoder",
        "TurboLoraReport": "lora_name",
        "TurboConvert": "source",
        "TurboMerge": "base",
    }.items():
        refused(node, "not found.*choose", **{given: name})


def test_damaged_loras_and_text_encoders(lab, refused, place):
    for kind, node, name in (
        ("loras", "TurboLoraReport", "lora_name"),
        ("text_encoders", "TurboTextEncoderLoader", "text_encoder"),
    ):
        for file, data in {"empty.safetensors": b"", "page.safetensors": b"<html>", "page.pth": b"<html>"}.items():
            (place / kind / file).write_bytes(data)
            refused(node, f"{file} .*(is damaged|is a web page).*[Dd]ownload", **{name: file})


@pytest.mark.parametrize("name", [T2V, "TinyWan2.1_VAE.pth", "tiny_umt5_enc.pth", STOCK])
def test_text_encoders_that_are_none(lab, refused, place, name):
    """The host takes any file for CLIP and starts it with random weights."""
    shutil.copy(lab.path(name), place / "text_encoders" / name)
    refused("TurboTextEncoderLoader", "not a umT5 encoder.*umt5_xxl_fp16", text_encoder=name)


def encoder(lab, change):
    """The small encoder of umT5 after a change to its tensors."""
    state = load_file(lab.path("tiny_umt5.safetensors"))
    change(state)
    return state


LAST = "encoder.block.1.layer.0.SelfAttention.q.weight"
ENCODERS = {
    "without its last q": (lambda s: s.pop(LAST), f"lacks {LAST}"),
    "of another depth": (lambda s: [s.pop(k) for k in list(s) if ".block.0." in k], "not a umT5"),
    "a scale of the weight's shape": (
        lambda s: s.update({LAST: s[LAST].to(torch.float8_e4m3fn), LAST.replace("weight", "scale_weight"): s[LAST]}),
        "the scale of .* is .64, 64.",
    ),
    "a scale that is NaN": (
        lambda s: s.update({LAST.replace("weight", "scale_weight"): torch.tensor(float("nan"))}),
        "NaN",
    ),
    "integers": (lambda s: s.update({LAST: s[LAST].to(torch.int8)}), "torch.int8"),
    "no tokenizer in it": (lambda s: s.update(spiece_model=torch.zeros(0, dtype=torch.uint8)), "tokenizer"),
    "a tokenizer of noise": (lambda s: s.update(spiece_model=s["spiece_model"].flip(0)), "tokenizer"),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_text_encoders_that_the_host_would_take(lab, refused, place, kind):
    """The host starts what is missing with random weights, and multiplies by any scale."""
    change, words = ENCODERS[kind]
    save_file(encoder(lab, change), place / "text_encoders" / "x.safetensors")
    refused("TurboTextEncoderLoader", f"x.safetensors.*{words}|{words}.*x.safetensors", text_encoder="x.safetensors")


def test_a_text_encoder_says_its_sizes_by_its_tensors(lab, given, place):
    """What the metadata say is not believed; what is packed again as a .pth is read right, or refused."""
    state = encoder(lab, lambda s: None)
    lying = {"config": json.dumps({"umt5xxl_model_config": {"d_model": 10**9, "num_layers": 10**6}})}
    save_file(state, place / "text_encoders" / "lies.safetensors", lying)
    torch.save(state, place / "text_encoders" / "x.pth")
    with (
        zipfile.ZipFile(place / "text_encoders" / "x.pth") as old,
        open(place / "text_encoders" / "again.pth", "wb") as new,
    ):
        new.write(packed([(entry.filename, old.read(entry)) for entry in old.infolist()]))
    shutil.copy(lab.path("tiny_umt5.safetensors"), place / "text_encoders" / "plain.safetensors")
    node, found = lab.pack.nodes["TurboTextEncoderLoader"], {}
    for name in ("plain.safetensors", "lies.safetensors", "x.pth", "again.pth"):
        clip = node.execute(name)[0]
        found[name] = clip.encode_from_tokens(clip.tokenize("a red circle"))
    assert found["plain.safetensors"].abs().max() > 0
    for name, result in found.items():
        assert torch.equal(result, found["plain.safetensors"]), name


def test_code_in_loras_and_text_encoders_does_not_run(lab, refused, place):
    Evil.target = str(place / "ran")
    for kind, node, name in (
        ("loras", "TurboLoraReport", "lora_name"),
        ("text_encoders", "TurboTextEncoderLoader", "text_encoder"),
    ):
        torch.save({"a": torch.zeros(1), "x": Evil()}, place / kind / "evil.pth")
        refused(node, "evil.pth was refused.*Nothing was run", **{name: "evil.pth"})
    assert not (place / "ran").exists()


def test_what_a_lora_states_of_its_alpha_may_be_anything(lab, given, place):
    state = lab.lora(given["t2v"])
    good = json.dumps({"lora_alpha": 8, "r": 4})
    for number, text in enumerate((good, "[]", "[" * 50000, '{"lora_alpha": [1], "r": {}}', '{"lora_alpha": "x"}')):
        name = f"{number}.safetensors"
        save_file(state, place / "loras" / name, {"lora_adapter_metadata": text})
        report = lab.pack.nodes["TurboLoraReport"].execute(given["t2v"], name)[0]
        assert ("states alpha" in report) == (text == good), report


@pytest.mark.skipif(os.name == "nt", reason="Windows does not let a mapped file be cut")
@pytest.mark.parametrize("name", [T2V, QUANT])
def test_a_model_that_is_cut_while_it_is_read(lab, loading, tmp_path, monkeypatch, healthy, name):
    """On the CPU the weights were mapped for as long as the MODEL lived: the next step ended ComfyUI (SIGBUS)."""
    path, checkpoint = tmp_path / "cut.pth", lab.pack.loading.checkpoint
    shutil.copy(lab.tiny / name, path)
    weights = checkpoint.weights

    def cut(file, **how):
        assert how == {"mapped": False}  # or the process would end here
        os.truncate(path, 5000)
        return weights(file, **how)

    monkeypatch.setattr(checkpoint, "weights", cut)
    with pytest.raises(lab.pack.errors.TurboError, match=r"cut\.pth changed while it was read: it was cut short"):
        loading("cut.pth")
    monkeypatch.undo()
    assert healthy()


@pytest.mark.skipif(os.name == "nt", reason="Windows does not let a mapped file be cut")
@pytest.mark.parametrize("name", [T2V, QUANT])
def test_a_model_that_was_read_does_not_need_its_file(lab, loading, tmp_path, name):
    shutil.copy(lab.tiny / name, tmp_path / "cut.pth")
    model, expected = loading("cut.pth"), lab.denoise(lab.load(name))
    os.truncate(tmp_path / "cut.pth", 5000)
    assert torch.equal(lab.denoise(model), expected)
