"""Wrong files and wrong settings: an error that names the culprit and the cure, and a host that goes on working."""

import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.lab import HIGH, LOW, QUANT, STOCK, T2V

SHAPE = (1, 16, 2, 8, 10)


@pytest.fixture(scope="module")
def healthy(lab):
    """What a good run gives, and a check that it still does."""
    expected = lab.turbo(lab.load(), lab.latent(SHAPE), steps=2)

    def check():
        assert torch.equal(lab.turbo(lab.load(), lab.latent(SHAPE), steps=2), expected)

    return check


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
    healthy()


def test_missing_file(lab, loading):
    """Removed between the listing and the run: the host's own error."""
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
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
    healthy()


def test_experts_that_do_not_belong_together(lab, healthy, tmp_path):
    high, low, t2v = lab.load(HIGH), lab.load(LOW), lab.load(T2V)
    latent = lab.latent(SHAPE)
    with pytest.raises(lab.pack.errors.TurboError, match=r"swapped.*I2V-low.*I2V-high"):
        lab.turbo(low, latent, model_low=high)
    with pytest.raises(lab.pack.errors.TurboError, match=r"different families \(in_dim 36 / 16\)"):
        lab.turbo(high, latent, model_low=t2v)
    # still told apart after other nodes have worked on them
    with pytest.raises(lab.pack.errors.TurboError, match="swapped"):
        lab.turbo(lab.quantize(low), latent, model_low=lab.attention(high))
    # files that do not say what they are get the benefit of the doubt
    shutil.copy(lab.path(HIGH), tmp_path / "a.pth")
    shutil.copy(lab.path(LOW), tmp_path / "b.pth")
    unnamed = [lab.load(tmp_path / name) for name in ("a.pth", "b.pth")]
    assert lab.turbo(unnamed[1], latent, model_low=unnamed[0]).isfinite().all()
    healthy()


@pytest.fixture
def foreign(comfy, lab):
    """A MODEL that is no Wan at all."""
    model = lab.load()
    model.model = torch.nn.Module()
    model.model.diffusion_model = torch.nn.Linear(2, 2)
    return model


def test_models_of_other_kinds(lab, foreign):
    for node, run in {
        "QuantizeW8A8": lambda: lab.quantize(foreign),
        "SparseLowBitAttention": lambda: lab.attention(foreign),
        "TurboSampler": lambda: lab.turbo(foreign),
        "TurboSave": lambda: lab.pack.nodes["TurboSave"].execute(foreign, "x"),
        "TurboScheduler": lambda: lab.sigmas(model=foreign),
    }.items():
        with pytest.raises(lab.pack.errors.TurboError, match=f"{node} expects a Wan model, got Linear"):
            run()
    with pytest.raises(lab.pack.errors.TurboError, match="TurboSampler expects a Wan model"):
        lab.turbo(lab.load(), model_low=foreign)


SIGMAS = {
    "EDM": [80.0, 14.6, 1.0, 0.0],
    "rising": [0.1, 0.5, 0.9],
    "repeated": [0.9, 0.5, 0.5, 0.0],
    "negative": [0.9, -0.1],
    "NaN": [0.9, float("nan"), 0.0],
    "one": [0.9],
    "none": [],
}


@pytest.mark.parametrize("sigmas", SIGMAS.values(), ids=SIGMAS)
def test_sigmas_of_the_wrong_range(lab, sigmas):
    with pytest.raises(lab.pack.errors.TurboError, match=r"sigmas must fall from at most 1.*Turbo Scheduler"):
        lab.turbo(lab.load(), lab.latent(SHAPE), sigmas=torch.tensor(sigmas))


def test_steps_and_sigma_max_out_of_range(lab, healthy):
    model = lab.load()
    for steps in (0, 5, 9, -1):
        with pytest.raises(lab.pack.errors.TurboError, match=f"1 to 4 steps, got {steps}: set steps to"):
            lab.turbo(model, lab.latent(SHAPE), steps=steps)
    with pytest.raises(lab.pack.errors.TurboError, match="sigma_max must be"):
        lab.turbo(model, lab.latent(SHAPE), sigma_max=5.0)
    healthy()


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "0,,x",
        "-1",
        "2",
        "1-0",
        "0-2",
        "0 1",
        "0.5",
        "0-",
        "99999999999999999999",
        "first 3",
        "last 0",
        "last",
        "first -1",
    ],
)
def test_block_lists(lab, text):
    model = lab.load()
    for run in (lambda: lab.attention(model, dense_blocks=text), lambda: lab.quantize(model, skip_blocks=text)):
        with pytest.raises(lab.pack.errors.TurboError, match="not within 0 to 1; write it like"):
            run()


def test_block_lists_as_people_write_them(lab):
    parse = lab.pack.inputs.parse_blocks
    assert parse(" 0 , 3-5,5 , 39,", 40) == {0, 3, 4, 5, 39}
    assert parse("", 40) == parse(" , ", 40) == frozenset()
    assert parse("first 2, Last 1, 20", 40) == {0, 1, 20, 39}


def test_odd_sizes_do_not_crash(lab, healthy):
    """The host pads latents to whole patches; a latent smaller than one key block works as well."""
    model = lab.attention(lab.load(), 0.3)
    for shape in ((1, 16, 1, 7, 9), (1, 16, 1, 2, 2), (2, 16, 3, 5, 4)):
        assert lab.turbo(model, lab.latent(shape), steps=1).shape == shape
    healthy()


def test_topk_out_of_range(lab):
    model = lab.load()
    with pytest.raises(lab.pack.errors.TurboError, match="topk"):
        lab.attention(model, 1.5)
    lab.denoise(lab.attention(model, 0.5))


def test_disk_full_while_saving(lab, tmp_path, monkeypatch):
    """A clear error and no half-written file."""
    stream = lab.pack.saving.stream_safetensors.__globals__
    usage = stream["shutil"].disk_usage(tmp_path)
    monkeypatch.setattr(stream["shutil"], "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(lab.pack.errors.TurboError, match="disk has"):
        lab.pack.saving.save_model(lab.load(), str(tmp_path / "x.safetensors"))
    assert not list(tmp_path.iterdir())


def test_conditioning_of_another_text_encoder(lab, healthy):
    """Text of the wrong width would fail deep in the model, with two shapes and no cure."""
    with pytest.raises(lab.pack.errors.TurboError, match="umT5"):
        lab.turbo(lab.load(), lab.latent(SHAPE), steps=1, positive=[[torch.zeros(1, 5, 32), {}]])
    healthy()
