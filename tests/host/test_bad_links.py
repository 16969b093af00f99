"""Models, latents, prompts and images of another kind: refused with the cure, or taken as the host takes them."""

import shutil

import pytest
import torch

from tests.helpers.lab import HIGH, LOW, T2V, TINY_SHAPE

OTHER_MODELS = {
    "QuantizeW8A8": ("model", "Wan model, got Flux.*pattern"),
    "SparseLowBitAttention": ("model", "Wan model, got Flux.*connect"),
    "TurboScheduler": ("model", "Wan model, got Flux.*connect"),
    "TurboSampler": ("model", "Wan model, got Flux.*connect"),
    "TurboSave": ("model", "Wan model, got Flux.*connect"),
    "TurboCompare": ("model_b", "Wan model, got Flux.*connect"),
}


@pytest.mark.parametrize("node", OTHER_MODELS)
def test_a_model_of_another_family(refused, given, node):
    name, match = OTHER_MODELS[node]
    refused(node, f"{node} expects a {match}", **{name: given["flux"]})


def test_other_wan_models_and_flux_where_any_will_do(lab, refused, given):
    refused("TurboSampler", "Wan model, got Flux", model_low=given["flux"])
    refused("TurboSampler", "different families", model_low=given["i2v"])
    refused("TurboCompare", "one family", model_b=given["i2v"])
    refused("QuantizeW8A8", "connect one", model=None, pattern="*")
    assert "not a Wan model" in lab.pack.nodes["TurboDoctor"].execute(given["flux"])[0]


def test_experts_that_do_not_belong_together(lab, healthy, tmp_path):
    high, low, t2v = lab.load(HIGH), lab.load(LOW), lab.load(T2V)
    latent = lab.latent(TINY_SHAPE)
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
    assert healthy()


LATENTS = {
    "no batch": (16, 8, 10),
    "no videos": (0, 16, 2, 8, 10),
    "no frames": (1, 16, 0, 8, 10),
    "no height": (1, 16, 2, 0, 10),
    "one dimension more": (1, 16, 2, 8, 10, 1),
}


@pytest.mark.parametrize("node", ["TurboSampler", "TurboCompare"])
@pytest.mark.parametrize("shape", LATENTS.values(), ids=LATENTS)
def test_latents_of_no_video(refused, node, shape):
    refused(node, r"\[batch, channels, frames, height, width\].*connect", latent_image={"samples": torch.zeros(shape)})


def test_latents_without_samples(refused):
    refused("TurboSampler", "holds no latent", latent_image={})


@pytest.mark.parametrize("shape", [(1, 4, 8, 10), (1, 4, 2, 8, 10), (1, 48, 2, 8, 10)])
def test_latents_of_another_vae(lab, refused, given, shape):
    """Empty ones of any kind become the model's own, as in the host's sampler; a picture in them does not."""
    refused("TurboSampler", f"{shape[1]} channels.*takes 16.*VAE", latent_image=lab.latent(shape, seed=1))
    out = lab.turbo(given["t2v"], lab.latent(shape), steps=1)
    assert out.shape == (1, 16, 1 if len(shape) == 4 else 2, 8, 10) and out.isfinite().all()


@pytest.mark.parametrize("model", ["t2v", "i2v", "stock"])
@pytest.mark.parametrize("shape", [(1, 16, 2, 5, 7), (1, 16, 1, 1, 1), (1, 16, 3, 9), (2, 16, 1, 1, 23)])
def test_odd_sizes_are_padded_and_cut_again(lab, given, model, shape):
    """Sparse, with the trained branch and without, and in int8 scores: 5 x 7 makes patches of 3 x 4."""
    for precision in ("bf16", "int8"):
        out = lab.turbo(lab.attention(given[model], 0.3, precision), lab.latent(shape, seed=2), steps=2)
        assert out.shape == (shape if len(shape) == 5 else (1, 16, 1, 3, 9)) and out.isfinite().all()


def test_batches_that_differ_are_repeated(lab, given):
    start = {"concat_latent_image": torch.zeros(3, 16, 2, 5, 7), "concat_mask": torch.ones(1, 1, 2, 5, 7)}
    latent = {**lab.latent((2, *TINY_SHAPE[1:])), "batch_index": [0], "noise_mask": torch.ones(3, 5, 5)}
    out = lab.turbo(given["i2v"], latent, steps=1, positive=lab.positive(**start))
    assert out.shape == (2, *TINY_SHAPE[1:]) and out.isfinite().all()


def test_start_image_of_the_vae_of_the_5b_model(refused, lab, given):
    image = {"concat_latent_image": torch.zeros(1, 48, 2, 4, 5), "concat_mask": torch.ones(1, 1, 2, 8, 10)}
    refused("TurboSampler", "48 channels.*Wan 2.1's", model=given["i2v"], positive=lab.positive(**image))


@pytest.mark.parametrize("node", ["TurboSampler", "TurboCompare"])
def test_conditioning_that_is_empty_or_of_another_encoder(lab, refused, node):
    refused(node, "positive holds no prompt: connect", positive=[])
    refused(node, "width 64, got 768.*umT5", positive=[[torch.zeros(1, 77, 768), {}]])
    image = {"concat_latent_image": torch.zeros(1, 4, 2, 8, 10)}
    refused(node, "start image.*4 channels.*takes 16", positive=lab.positive(**image))


IMAGES = {
    (1, 1, 400, 3): "crop it",
    (1, 0, 5, 3): "none of them 0",
    (5, 5): "height, width",
    (5, 5, 3): "height, width",
}


@pytest.mark.parametrize("shape", IMAGES)
def test_images_of_no_use(refused, shape):
    refused("TurboSize", IMAGES[shape], image=torch.zeros(shape))


def test_image_of_one_pixel_is_a_square(lab):
    width, height, _ = lab.pack.nodes["TurboSize"].execute("480p", "16:9", 5.0, torch.zeros(1, 1, 1, 3)).result
    assert width == height and width % 16 == 0
