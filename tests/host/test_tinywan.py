"""The trained small family in ComfyUI: its own VAE loader, our loaders, the same numbers as the standalone library."""

import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from turbo_core import checkpoint
from turbo_core.tinywan import FILES, PAIR, world
from turbo_core.vae import encode_video, load_vae
from turbo_core.wan import WanModel


@pytest.fixture(scope="module")
def family(pack):
    folder = pack.root / "models" / "tinywan"
    if not (folder / FILES["vae"]).is_file():
        pytest.skip("this copy comes without models/tinywan")
    return folder


def test_the_vae_in_the_hosts_loader(comfy, family):
    tensors = comfy.utils.load_torch_file(str(family / FILES["vae"]))
    host, ours = comfy.sd.VAE(sd=tensors), load_vae(family / FILES["vae"])
    video = torch.rand(9, 64, 48, 3, generator=torch.Generator().manual_seed(0))
    latent = host.encode(video)
    with torch.no_grad():
        mean = ours.encode(video.movedim(-1, 0)[None] * 2 - 1)[0]
        torch.testing.assert_close(latent.float(), mean, atol=0.15, rtol=0.05)  # the host computes in bfloat16
        shown = ours.decode(latent.float())[0].movedim(0, -1).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(host.decode(latent)[0].float(), shown, atol=0.05, rtol=0.05)


def test_the_text_encoder_knows_what_a_caption_says_in_any_wording(pack, family):
    clip = pack.loading.load_text_encoder(str(family / FILES["text"]))
    scenes = world.random_scenes(6, torch.Generator().manual_seed(0))
    means = []
    for wording in (0, 100):
        for i, scene in enumerate(scenes):
            hidden = clip.encode_from_tokens(clip.tokenize(world.caption(scene, wording + i)))[0].float()
            means.append(hidden[hidden.abs().sum(1) > 0].mean(0))
    one, other = torch.stack(means).chunk(2)
    assert torch.equal(torch.cdist(one, other).argmin(1), torch.arange(6))


@pytest.mark.parametrize("style", ["scaled_fp8", "comfy_quant"])
def test_a_scaled_fp8_text_encoder_is_read_with_its_scales(pack, comfy, family, tmp_path, style):
    """Both ways in which such files are published: their weights alone, without the scales, are another encoder."""
    tensors = comfy.utils.load_torch_file(str(family / FILES["text"]))
    stored = {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if tensor.ndim != 2 or ".layer." not in name or "block.23" in name or "relative" in name:
            stored[name] = tensor
            continue
        scale = tensor.float().abs().max() / 448
        stored[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
        stored[f"{layer}.scale_weight" if style == "scaled_fp8" else f"{layer}.weight_scale"] = scale
        if style == "comfy_quant":
            entry = list(json.dumps({"format": "float8_e4m3fn"}).encode())
            stored[f"{layer}.comfy_quant"] = torch.tensor(entry, dtype=torch.uint8)
    if style == "scaled_fp8":
        stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    with safe_open(family / FILES["text"], "pt") as file:
        save_file(stored, tmp_path / "scaled.safetensors", file.metadata())
    hidden = []
    for path in (family / FILES["text"], tmp_path / "scaled.safetensors"):
        clip = pack.loading.load_text_encoder(str(path))
        hidden.append(clip.encode_from_tokens(clip.tokenize(world.caption((0, 1, 2, 3), 0)))[0].float())
    assert (hidden[1] - hidden[0]).norm() / hidden[0].norm() < 0.05


def test_a_text_encoder_can_be_made_again_for_hooks(pack, family):
    clip = pack.loading.load_text_encoder(str(family / FILES["text"]))
    again = clip.patcher.clone(disable_dynamic=True) if clip.patcher.is_dynamic() else _again(clip.patcher)
    own, made = clip.patcher.model.state_dict(), again.model.state_dict()
    assert own.keys() == made.keys() and all(torch.equal(tensor, made[name]) for name, tensor in own.items())


def _again(patcher):
    make, given, *_ = patcher.cached_patcher_init
    return make(*given, disable_dynamic=True)


@pytest.mark.parametrize("name", ["teacher", "student", "turbo", "high", "low"])
def test_the_transformer(lab, pack, family, name):
    path = family / (FILES | PAIR)[name]
    state, described = checkpoint.load(path)
    model = WanModel.from_state_dict(state, torch.float32, num_heads=described.num_heads)
    host = lab.dense(lab.load(str(path), torch.float32))
    given = lab.inputs((1, 16, 3, 16, 16), sigma=0.7, concat=described.in_dim - 16)
    context = torch.nn.functional.pad(given["c_crossattn"], (0, 0, 0, 512 - given["c_crossattn"].shape[1]))
    given["c_crossattn"] = context
    options = {**host.model_options["transformer_options"], "sigmas": given["t"]}
    theirs = lab.loaded(host).apply_model(**given, transformer_options=options)
    ours = given["x"] - 0.7 * model(given["x"], torch.tensor([700.0]), context, given.get("c_concat"))
    assert lab.distance(theirs.float(), ours) < 1e-3


def test_the_teacher_is_not_taken_for_a_student(lab, family):
    of_sampling = vars(sys.modules[lab.pack.nodes["TurboSampler"].__module__])["of_sampling"]
    told = {
        name: "not known to be distilled" in " ".join(
            of_sampling(lab.load(str(family / FILES[name])), None, 0.9, [1.0, 0.7, 0.0])
        )
        for name in ("teacher", "student", "turbo")
    }  # fmt: skip
    assert told == {"teacher": True, "student": False, "turbo": False}


def test_latents_have_the_statistics_that_the_host_expects(family):
    random = torch.Generator().manual_seed(3)
    video = world.render(world.random_scenes(8, random), 17, 128, 128, random)
    latent = encode_video(load_vae(family / FILES["vae"]), video)
    assert abs(latent.mean().item()) < 0.15 and 0.8 < latent.std().item() < 1.2


def test_loaders_list_the_family_and_a_person_s_own_file_comes_first(comfy, pack, tmp_path, monkeypatch):
    import folder_paths

    host, ours = folder_paths.folder_names_and_paths, pack.part("nodes.host.files")
    for kind in ("diffusion_models", "vae", "text_encoders"):
        own = tmp_path / kind
        own.mkdir()
        (own / "mine.safetensors").touch()
        monkeypatch.setitem(host, kind, ([str(own)], {".safetensors"}))
    (tmp_path / "vae" / "TinyWan2.1_VAE.safetensors").touch()
    for _ in range(2):  # a host that loads its nodes again
        ours.register_tinywan()
    try:
        for file in (FILES | PAIR).values():
            kind, name = file.split("/")
            listed = folder_paths.get_filename_list_(kind)[0]
            assert listed.count(name) == 1 and "mine.safetensors" in listed
            assert all(other.startswith("TinyWan") for other in listed if other != "mine.safetensors")
            own = kind == "vae"
            root = tmp_path if own else pack.root / "models" / "tinywan"
            assert folder_paths.get_full_path(kind, name) == str(root / file)
        assert len(folder_paths.get_folder_paths("vae")) == 2
        assert ours.new_model("new", False) == tmp_path / "diffusion_models" / "new.safetensors"
    finally:
        folder_paths.filename_list_cache.clear()
