"""Prompt and image to video on the tiny family: the reference's rule, the experts' hand-over, memory, bad input."""

import itertools
import weakref

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.helpers.tiny_family import tiny_tokenizer
from turbo_core import pipeline
from turbo_core.checkpoint import read
from turbo_core.disk import Disk
from turbo_core.errors import TurboError
from turbo_core.pipeline import embeddings, experts, resident, text
from turbo_core.schedule import rcm_sigmas
from turbo_core.tinywan.text import tiny_text_encoder
from turbo_core.vae import coders, encode_video, load_vae
from turbo_core.wan import WanModel

SMALL = {"size": (32, 32), "frames": 5, "device": "cpu"}


def t2v(tiny, prompt="a red circle", dit="TinyWan2.1-T2V.pth", **settings):
    files = tiny / dit, tiny / "TinyWan2.1_VAE.pth", tiny / "tiny_umt5.safetensors"
    return pipeline.generate(prompt, *files, **(SMALL | settings))


def i2v(tiny, **settings):
    settings = {"dit_low": tiny / "TinyWan2.2-I2V-low-quant.pth", "image": tiny / "image.png"} | settings
    return t2v(tiny, dit="TinyWan2.2-I2V-high-quant.pth", **settings)


def test_a_video_depends_on_seed_prompt_and_rule_and_on_nothing_else(tiny):
    first = t2v(tiny, steps=2)
    assert first.frames.shape == (5, 32, 32, 3) and first.frames.dtype == torch.uint8
    assert first.latents.shape == (1, 16, 2, 4, 4)
    assert first.frames.float().std() > 10
    torch.manual_seed(99)  # global random state must not matter
    assert torch.equal(t2v(tiny, steps=2).latents, first.latents)
    for change in ({"seed": 1}, {"prompt": "a blue square"}, {"ode": True}, {"topk": None}):
        assert not torch.equal(t2v(tiny, steps=2, **change).latents, first.latents), change


def test_quantized_and_unquantized_files_agree(tiny):
    full, quantized = t2v(tiny, steps=1).latents, t2v(tiny, dit="TinyWan2.1-T2V-quant.pth", steps=1).latents
    error = ((full - quantized).norm() / full.norm()).item()
    assert 0 < error < 0.05


def test_topk_defaults_to_what_the_file_was_trained_for(tiny):
    assert t2v(tiny, steps=1).settings["topk"] == 0.1
    assert t2v(tiny, dit="tiny_wan_stock_bf16.safetensors", steps=1).settings["topk"] is None


def test_kernels_are_proved_once_before_the_model_is_loaded(tiny, monkeypatch):
    events = []
    monkeypatch.setattr(resident, "prove", lambda device: events.append(str(device)))
    i2v(tiny, steps=2, progress=lambda stage, *_: events.append(stage))
    assert events.count("cpu") == 1 and events.index("cpu") < events.index("load DiT")


def test_progress_times_and_memory_are_reported(tiny):
    events = []
    result = i2v(tiny, progress=lambda *event: events.append(event))
    assert [event for event in events if event[0] == "sampling"] == [("sampling", i, 4) for i in (0, 1, 2, 3, 4, 4)]
    stages = {"load VAE", "text encoder", "encode image", "load DiT", "sampling", "decode"}
    assert set(result.seconds) == {event[0] for event in events} == stages
    order = list(dict.fromkeys(event[0] for event in events))
    assert order == ["load VAE", "text encoder", "encode image", "load DiT", "sampling", "decode"], "as they happen"
    for stage in ("text encoder", "load DiT"):
        bytes_read = [event[1:] for event in events if event[0] == stage and event[2] > 1]
        assert len(bytes_read) > 15 and all(0 < done < total for done, total in bytes_read)
    assert all(seconds >= 0 for seconds in result.seconds.values())
    assert len(result.step_seconds) == 4
    assert result.peak_memory.get("process", 1e8) > 1e7


def network(weight):
    """Stands for an expert; remembers the timesteps it is given."""

    def forward(x, timestep, context, y=None, topk=None, precision="bf16"):
        forward.timesteps += timestep.tolist()
        return weight * x + timestep.view(-1, 1, 1, 1, 1) / 1000

    forward.timesteps = []
    return forward


@pytest.mark.parametrize("ode", [False, True])
def test_sampling_is_the_references_loop(ode):
    """Float64 state, one generator through the hand-over, noise of the last step never used."""
    shape, sigmas = (1, 16, 2, 2, 2), rcm_sigmas(4, 200)
    high, low = network(0.5), network(-0.3)
    latents = pipeline.sample(lambda t: high if t >= 0.9 else low, None, shape, sigmas, seed=7, ode=ode)

    generator = torch.Generator().manual_seed(7)
    t = sigmas.tolist()
    x = torch.randn(shape, generator=generator).double() * t[0]
    for now, after in itertools.pairwise(t):
        rounded = (torch.tensor(now, dtype=torch.float32) * 1000).bfloat16().float()
        v = ((0.5 if now >= 0.9 else -0.3) * x.float() + rounded / 1000).double()
        if ode:
            x = x - (now - after) * v
        else:
            x = (1 - after) * (x - now * v) + after * torch.randn(shape, generator=generator)
    torch.testing.assert_close(latents, x.float(), rtol=1e-6, atol=1e-6)


def test_the_network_sees_timesteps_rounded_to_bfloat16():
    net = network(0.1)
    pipeline.sample(lambda t: net, None, (1, 16, 1, 2, 2), rcm_sigmas(4, 200))
    assert net.timesteps == [996, 932, 852, 608]
    net.timesteps.clear()
    pipeline.sample(lambda t: net, None, (1, 16, 1, 2, 2), rcm_sigmas(1, 80))
    assert net.timesteps == [988]


BOTH = ["high", "low"]


@pytest.mark.parametrize(("steps", "loaded"), [(4, BOTH), (3, BOTH), (2, BOTH[:1]), (1, BOTH[:1])])
def test_only_the_experts_that_are_needed_are_read(tiny, steps, loaded, monkeypatch):
    read, weights = [], experts.weights
    monkeypatch.setattr(
        experts, "weights", lambda file, **how: read.append(file.description.path) or weights(file, **how)
    )
    i2v(tiny, steps=steps)
    assert read == [str(tiny / f"TinyWan2.2-I2V-{name}-quant.pth") for name in loaded]


def test_one_large_model_at_a_time(tiny, monkeypatch):
    """The text encoder is gone before the DiT is read, the high expert before the low one, both before decoding."""
    alive, seen = [], []

    def tracked(function, pick):
        def wrapper(*arguments, **settings):
            seen.append(sum(reference() is not None for reference in alive))
            result = function(*arguments, **settings)
            alive.append(weakref.ref(pick(result)))
            return result

        return wrapper

    monkeypatch.setattr(embeddings, "load_text_encoder", tracked(text.load_text_encoder, lambda result: result[0]))
    monkeypatch.setattr(WanModel, "from_state_dict", tracked(WanModel.from_state_dict, lambda result: result))
    monkeypatch.setattr(resident, "decode_frames", tracked(resident.decode_frames, lambda result: result))
    i2v(tiny)
    assert seen == [0, 0, 0, 0]


def test_a_file_is_let_go_before_the_next_expert_is_read(tiny, monkeypatch):
    """Mapped pages count as memory of the process, and on a CPU without room for more all weights are such pages."""
    mapped, alive, map_file, weights = {}, [], read._map, experts.weights

    def remembered(source, writable):
        mapping = map_file(source, writable)
        mapped[source.path.name] = weakref.ref(mapping)
        return mapping

    def seen(file, **how):
        alive.append({name for name, reference in mapped.items() if reference() is not None})
        return weights(file, **how)

    monkeypatch.setattr(Disk, "stays_mapped", lambda *_: True)
    monkeypatch.setattr(read, "_map", remembered)
    monkeypatch.setattr(experts, "weights", seen)
    i2v(tiny)
    high, low = "TinyWan2.2-I2V-high-quant.pth", "TinyWan2.2-I2V-low-quant.pth"
    assert alive == [{high, low}, {low}]


def test_image_conditioning_is_the_mask_then_the_encoded_clip(tiny):
    vae = load_vae(tiny / "TinyWan2.1_VAE.pth")
    image = torch.linspace(-1, 1, 3 * 16 * 16).view(3, 16, 16)
    y = pipeline.encode_image(vae, image, 9)
    assert y.shape == (1, 20, 3, 2, 2)
    assert (y[:, :4, 0] == 1).all() and (y[:, :4, 1:] == 0).all()
    clip = torch.zeros(1, 3, 9, 16, 16)
    clip[:, :, 0] = image
    assert torch.equal(y[:, 4:], encode_video(vae, clip))


def test_adaptive_size_follows_the_image(tiny):
    result = i2v(tiny, adaptive=True, size=(64, 64), steps=1)
    assert result.settings["size"] == "96x48"  # the image is 2:1, the area 64 x 64
    assert result.frames.shape == (5, 48, 96, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "1 to 4"),
        ({"steps": 101}, "1 to 4"),
        ({"size": (40, 32)}, "nearest is 32x32"),
        ({"frames": 8}, "nearest is 9"),
        ({"boundary": 1.5}, "use 0.9"),
        ({"topk": 0.0}, "topk"),
        ({"topk": 1.5}, "topk"),
        ({"precision": "fp4"}, "bf16, int8"),
        ({"sigma_max": 5.0}, "sigma_max"),
        ({"device": "toaster"}, "Leave --device out"),
        ({"noise_device": "toaster"}, "Use --noise-device cpu"),
        ({"noise_device": "meta"}, "Use --noise-device cpu"),
        ({"image": "image.png"}, "leave --image out"),
        ({"dit_low": "TinyWan2.1-T2V.pth"}, "same file"),
        ({"dit_low": "TinyWan2.2-I2V-low.pth"}, "experts differ"),
    ],
)
def test_bad_settings_name_the_cure_before_anything_is_loaded(tiny, settings, message, monkeypatch):
    monkeypatch.setattr(coders, "load_vae", lambda *_: pytest.fail("went on to load models"))
    settings = {key: tiny / value if key in ("image", "dit_low") else value for key, value in settings.items()}
    with pytest.raises(TurboError, match=message):
        t2v(tiny, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": None}, "pass --image"),
        ({"image": "none.png"}, "not a file"),
        ({"image": "spiece.model"}, "cannot be read"),
        ({"dit_low": None}, "give the high-noise file as --dit and the low-noise file as --dit-low"),
    ],
)
def test_bad_image_to_video_input_names_the_cure(tiny, settings, message):
    with pytest.raises(TurboError, match=message):
        i2v(tiny, **{key: value and tiny / value for key, value in settings.items()})


def test_swapped_experts_are_told_by_their_names(tiny):
    with pytest.raises(TurboError, match="look swapped"):
        t2v(
            tiny,
            dit="TinyWan2.2-I2V-low.pth",
            dit_low=tiny / "TinyWan2.2-I2V-high.pth",
            image=tiny / "image.png",
        )


def test_files_in_the_wrong_place_are_named(tiny):
    with pytest.raises(TurboError, match=r"tiny_umt5\.safetensors is not a Wan diffusion model"):
        t2v(tiny, dit="tiny_umt5.safetensors")
    with pytest.raises(TurboError, match="not a Wan VAE"):
        pipeline.generate("x", tiny / "TinyWan2.1-T2V.pth", tiny / "tiny_umt5.safetensors", "", **SMALL)
    with pytest.raises(TurboError, match="not a umT5 encoder"):
        pipeline.generate(
            "x", tiny / "TinyWan2.1-T2V.pth", tiny / "TinyWan2.1_VAE.pth", tiny / "TinyWan2.1_VAE.pth", **SMALL
        )


def test_a_text_encoder_of_another_width_is_named(tiny, tmp_path):
    state = tiny_text_encoder(tiny_tokenizer())
    for name, value in state.items():
        if "SelfAttention.o" in name or name.endswith("wo.weight"):
            state[name] = value[:32].clone()
        elif value.shape[-1] == 64 and "spiece" not in name:
            state[name] = value[..., :32].clone()
    save_file(state, tmp_path / "narrow.safetensors")
    with pytest.raises(TurboError, match=r"gives 32 numbers a token.*expects 64"):
        files = tiny / "TinyWan2.1-T2V.pth", tiny / "TinyWan2.1_VAE.pth", tmp_path / "narrow.safetensors"
        pipeline.generate("x", *files, **SMALL)


def test_latents_that_are_not_finite_are_an_error_not_a_black_video(tiny, monkeypatch):
    monkeypatch.setattr(WanModel, "forward", lambda self, x, *_, **__: x * float("nan"))
    with pytest.raises(TurboError, match="NaN"):
        t2v(tiny)


def test_conditioning_reaches_the_picture(tiny, tmp_path):
    Image.new("RGB", (32, 32), (0, 255, 0)).save(tmp_path / "green.png")
    assert not torch.equal(i2v(tiny, steps=1).latents, i2v(tiny, steps=1, image=tmp_path / "green.png").latents)


def test_a_vae_that_gives_nan_makes_no_video(tiny, tmp_path):
    """The first decoder with one NaN wrote a video, and exit code 0."""
    state = torch.load(tiny / "TinyWan2.1_VAE.pth", weights_only=True)
    state["decoder.head.2.bias"] = state["decoder.head.2.bias"] * float("nan")
    torch.save(state, tmp_path / "vae.pth")
    files = tiny / "TinyWan2.1-T2V.pth", tmp_path / "vae.pth", tiny / "tiny_umt5.safetensors"
    with pytest.raises(TurboError, match="VAE: it gave NaN or infinity"):
        pipeline.generate("a red circle", *files, steps=1, **SMALL)
