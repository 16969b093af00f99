"""TurboSampler, TurboScheduler and the turbo_rcm scheduler against the host's own samplers."""

import pytest
import torch

from tests.helpers.lab import HIGH, LOW, QUANT, T2V, TINY_SHAPE

SIGMAS_80 = [0.9876543, 0.9337806, 0.8528947, 0.6089787, 0.0]


@pytest.fixture(scope="module")
def t2v(lab):
    return lab.load(T2V)


@pytest.fixture(scope="module")
def experts(lab):
    return lab.load(HIGH), lab.load(LOW)


@pytest.fixture
def image(lab):
    """An image-to-video conditioning: the encoded clip and its mask, as WanImageToVideo makes them."""
    mask = torch.ones(1, 1, 2, 8, 10)
    mask[:, :, :1] = 0
    return lab.positive(concat_latent_image=lab.draw(*TINY_SHAPE, seed=20), concat_mask=mask)


@pytest.fixture
def evaluations(lab):
    """Count a MODEL's evaluations, and see their sigmas, through a wrapper such as other nodes add."""

    def watch(model):
        model, sigmas = model.clone(), []

        def wrapper(apply, args):
            sigmas.append(args["timestep"].max().item())
            return apply(args["input"], args["timestep"], **args["c"])

        model.set_model_unet_function_wrapper(wrapper)
        return model, sigmas

    return watch


def test_schedule_node(lab, t2v, experts):
    torch.testing.assert_close(lab.sigmas(4), torch.tensor(SIGMAS_80))
    assert torch.equal(lab.sigmas(4, model=t2v), lab.sigmas(4))
    assert lab.sigmas(4, model=experts[0])[0].item() == pytest.approx(0.995025, abs=1e-6)
    assert lab.sigmas(1, 1600.0)[0].item() == pytest.approx(1600 / 1601)


@pytest.mark.parametrize("mode", ["SDE", "ODE"])
@pytest.mark.parametrize("seed", [None, 11])
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_equals_stock_sampler(lab, t2v, mode, seed, steps):
    """SDE is stock lcm, ODE is stock euler, from an empty latent and from a given one."""
    latent = lab.latent(TINY_SHAPE, seed)
    ours = lab.turbo(t2v, latent, steps=steps, mode=mode)
    theirs = lab.custom(t2v, {"SDE": "lcm", "ODE": "euler"}[mode], lab.sigmas(steps), latent)
    print(mode, seed, steps, lab.difference(ours, theirs))
    assert lab.difference(ours, theirs) < 1e-5


def test_modes_and_seeds_differ(lab, t2v):
    latent = lab.latent(TINY_SHAPE)
    results = [lab.turbo(t2v, latent, mode=m, seed=s) for m in ("SDE", "ODE") for s in (1, 2)]
    assert all(lab.difference(a, b) > 0.05 for i, a in enumerate(results) for b in results[:i])
    assert torch.equal(lab.turbo(t2v, latent, seed=2**64 - 1, steps=1), lab.turbo(t2v, latent, seed=2**64 - 1, steps=1))
    assert torch.equal(lab.turbo(lab.load(T2V), latent, mode="SDE", seed=2), results[1])
    # one step has no noise to add: both modes are the same
    assert torch.equal(*(lab.turbo(t2v, latent, mode=m, steps=1) for m in ("SDE", "ODE")))


def ksample(lab, model, latent=None, steps=4, sampler="lcm", positive=None, denoise=1.0, **advanced):
    import nodes

    positive, latent = positive or lab.positive(), latent or lab.latent(TINY_SHAPE)
    given = (3, steps, 1.0, sampler, "turbo_rcm", positive, positive, latent)
    if not advanced:
        return nodes.KSampler().sample(model, *given, denoise=denoise)[0]["samples"]
    advanced = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 10000, **advanced}
    node = nodes.KSamplerAdvanced()
    return node.sample(model, noise_seed=given[0], **dict(zip(KEYS, given[1:])), **advanced)[0]["samples"]


KEYS = ("steps", "cfg", "sampler_name", "scheduler", "positive", "negative", "latent_image")


def test_plain_ksampler(lab, t2v):
    """lcm + turbo_rcm in the node that everybody has equals TurboSampler and SamplerCustom."""
    import nodes

    assert "turbo_rcm" in nodes.KSampler.INPUT_TYPES()["required"]["scheduler"][0]
    ours = lab.turbo(t2v, lab.latent(TINY_SHAPE))
    theirs = ksample(lab, t2v)
    assert lab.difference(ours, theirs) < 1e-5
    assert torch.equal(theirs, lab.custom(t2v, "lcm", lab.sigmas(4), lab.latent(TINY_SHAPE)))
    assert lab.difference(ksample(lab, t2v, sampler="euler"), lab.turbo(t2v, lab.latent(TINY_SHAPE), mode="ODE")) < 1e-5


def test_ksampler_takes_sigma_max_from_the_model(lab, t2v, experts, image, evaluations):
    for model, positive, first in ((t2v, None, SIGMAS_80[0]), (experts[0], image, 0.995025)):
        watched, seen = evaluations(model)
        ksample(lab, watched, steps=2, positive=positive)
        assert seen[0] == pytest.approx(first, abs=1e-6) and len(seen) == 2


def test_sigma_max_survives_quantizing_and_a_sampling_node(lab, experts, image, evaluations, caplog):
    """ModelSamplingSD3 replaces what KSampler's scheduler sees: that is told; TurboSampler asks the model itself."""
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    quantized, seen = evaluations(lab.quantize(experts[0]))
    ksample(lab, quantized, steps=1, positive=image)
    shifted = ModelSamplingSD3().patch(quantized, 5.0)[0]
    lab.turbo(shifted, lab.latent(TINY_SHAPE), steps=1, positive=image)
    assert seen == pytest.approx([0.995025] * 2, abs=1e-6)
    with caplog.at_level("INFO"):
        lab.pack.settings.log_once.cache_clear()
        ksample(lab, shifted, steps=1, positive=image)
    assert seen[-1] == pytest.approx(SIGMAS_80[0]) and "TurboScheduler" in caplog.text


def test_shift_does_not_change_the_result(lab, t2v):
    """Wan's timestep is 1000 sigma whatever the shift."""
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    latent = lab.latent(TINY_SHAPE)
    assert torch.equal(lab.turbo(ModelSamplingSD3().patch(t2v, 3.0)[0], latent), lab.turbo(t2v, latent))


def test_ksampler_advanced_start_and_end(lab, t2v):
    """Stopping after two of four steps and going on from there is one run, in ODE."""
    whole = ksample(lab, t2v, sampler="euler", return_with_leftover_noise="disable")
    assert torch.equal(whole, ksample(lab, t2v, sampler="euler"))
    half = ksample(lab, t2v, sampler="euler", end_at_step=2, return_with_leftover_noise="enable")
    rest = ksample(
        lab, t2v, {"samples": half}, sampler="euler", start_at_step=2, add_noise="disable",
        return_with_leftover_noise="disable",
    )  # fmt: skip
    assert lab.difference(rest, whole) < 1e-5
    assert lab.difference(half, whole) > 0.05


def test_ksampler_denoise(lab, t2v, evaluations):
    """steps / denoise is the number of steps of the whole schedule; the error of too many says so."""
    watched, seen = evaluations(t2v)
    latent = lab.latent(TINY_SHAPE, seed=11)
    ksample(lab, watched, latent, steps=2, denoise=0.5)
    assert seen == pytest.approx(SIGMAS_80[2:4])
    seen.clear()
    ksample(lab, watched, latent, steps=4, denoise=0.5)  # the later half of eight, every second of them of the four
    assert len(seen) == 4 and seen[::2] == pytest.approx(SIGMAS_80[2:4])
    with pytest.raises(ValueError, match=r"100 at most, got 200.*denoise"):
        ksample(lab, t2v, latent, steps=50, denoise=0.25)
    with pytest.raises(ValueError, match="100 at most, got 101"):
        ksample(lab, t2v, steps=101)
    assert torch.equal(ksample(lab, t2v), ksample(lab, t2v))


@pytest.mark.parametrize(("steps", "first", "second"), [(4, 2, 2), (3, 2, 1), (2, 2, 0), (1, 1, 0)])
def test_experts_share_the_steps(lab, experts, image, evaluations, steps, first, second):
    (high, seen_high), (low, seen_low) = evaluations(experts[0]), evaluations(experts[1])
    lab.turbo(high, lab.latent(TINY_SHAPE), steps=steps, model_low=low, positive=image)
    assert (len(seen_high), len(seen_low)) == (first, second)
    assert all(s >= 0.9 for s in seen_high) and all(s < 0.9 for s in seen_low)


def test_a_step_at_the_boundary_is_the_high_noise_experts(lab, experts):
    """Sigmas are float32: the 0.9 that is typed is a little below the boundary's 0.9."""
    sigmas = torch.tensor([1.0, 0.9, 0.5, 0.0])
    parts = lab.pack.part("nodes.host.run").experts_of(*experts, sigmas, 0.9)
    assert [len(part) - 1 for _, part in parts] == [2, 1]


def test_boundary_moves_the_hand_over(lab, experts, image, evaluations):
    for boundary, first in ((0.0, 4), (0.7, 3), (0.95, 1), (1.0, 0)):
        (high, seen_high), (low, seen_low) = evaluations(experts[0]), evaluations(experts[1])
        lab.turbo(high, lab.latent(TINY_SHAPE), model_low=low, positive=image, boundary=boundary)
        assert (len(seen_high), len(seen_low)) == (first, 4 - first)


@pytest.mark.parametrize("seed", [None, 11])
def test_experts_equal_a_split_run(lab, experts, image, seed):
    """ODE: two stock euler runs over the two halves of the sigmas."""
    from comfy_extras.nodes_custom_sampler import SamplerCustom

    sigmas, latent = lab.sigmas(4, 200.0), lab.latent(TINY_SHAPE, seed)
    euler = lab.comfy.samplers.sampler_object("euler")
    half = SamplerCustom.execute(experts[0], True, 3, 1.0, image, image, euler, sigmas[:3], latent)[0]
    split = SamplerCustom.execute(experts[1], False, 3, 1.0, image, image, euler, sigmas[2:], half)[0]["samples"]
    ours = lab.turbo(experts[0], latent, model_low=experts[1], mode="ODE", positive=image)
    print("split", seed, lab.difference(ours, split))
    assert lab.difference(ours, split) < 2e-6


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", ["SDE", "ODE"])
def test_one_noise_stream_runs_through_the_hand_over(lab, experts, image, mode, masked):
    """The same model twice is a single-model run, also where a mask keeps half of the picture (inpainting)."""
    latent = lab.latent(TINY_SHAPE, 11)
    if masked:
        latent["noise_mask"] = torch.zeros(1, 1, 2, 8, 10)
        latent["noise_mask"][..., :5] = 1
    both = lab.turbo(experts[0], latent, model_low=experts[0].clone(), mode=mode, positive=image)
    single = lab.turbo(experts[0], latent, mode=mode, positive=image)
    print("hand-over", mode, masked, lab.difference(both, single))
    assert lab.difference(both, single) < 2e-6
    if masked:
        kept = latent["samples"][..., 5:]
        assert lab.difference(both[..., 5:], kept) < 1e-5
        assert lab.difference(both[..., :5], latent["samples"][..., :5]) > 0.1


def test_mask_with_two_different_experts(lab, experts, image):
    """As the stock sampler with the same mask, expert by expert."""
    latent = lab.latent(TINY_SHAPE, 11)
    latent["noise_mask"] = torch.ones(1, 1, 2, 8, 10)
    latent["noise_mask"][..., :3, :] = 0
    out = lab.turbo(experts[0], latent, model_low=experts[1], positive=image)
    assert lab.difference(out[..., :3, :], latent["samples"][..., :3, :]) < 1e-5
    plain = lab.turbo(experts[0], lab.latent(TINY_SHAPE, 11), model_low=experts[1], positive=image)
    assert lab.difference(out, plain) > 0.05


def test_each_expert_keeps_its_own_settings(lab, experts, image):
    """Attention settings and LoRA of one expert do not reach the other, and are gone afterwards."""
    high, low = experts
    latent = lab.latent((1, 16, 2, 16, 18))  # 144 tokens: three key blocks to choose from
    run = lambda a, b: lab.turbo(a, latent, model_low=b, mode="ODE", steps=3, positive=image)  # noqa: E731
    plain = run(high, low)
    with_lora = lab.merged(low, lab.lora(low, scale=0.8))
    results = [plain, run(lab.attention(high, 0.9), low), run(high, lab.attention(low, 0.9)), run(high, with_lora)]
    results.append(run(lab.attention(high, 0.9), with_lora))
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])
    assert torch.equal(run(high, low), plain)


def test_quantized_experts(lab, image):
    files = "TinyWan2.2-I2V-high-quant.pth", "TinyWan2.2-I2V-low-quant.pth"
    high, low = map(lab.load, files)
    ours = lab.turbo(high, lab.latent(TINY_SHAPE), model_low=low, positive=image)
    assert ours.isfinite().all() and ours.shape == TINY_SHAPE
    assert torch.equal(ours, lab.turbo(high, lab.latent(TINY_SHAPE), model_low=low, positive=image))


def test_batch_index(lab, t2v):
    """The third sample of a batch, made alone, starts from the same noise."""
    latents = lab.latent((3, *TINY_SHAPE[1:]))
    batch = lab.turbo(t2v, latents, mode="ODE", steps=2)
    one = lab.turbo(t2v, {**lab.latent(TINY_SHAPE), "batch_index": [2]}, mode="ODE", steps=2)
    third = lab.turbo(t2v, {**latents, "batch_index": [2, 0, 1]}, mode="ODE", steps=2)
    assert third.shape == batch.shape and lab.difference(third[:1], one) < 1e-5
    assert lab.difference(third[:1], batch[:1]) > 0.05


def test_latent_dictionary_goes_through(lab, t2v):
    """Foreign entries stay, the empty latent's hints go, and the input is not written to."""
    latent = {**lab.latent(TINY_SHAPE), "batch_index": [0], "note": 1, "downscale_ratio_spacial": 8}
    before = {**latent, "samples": latent["samples"].clone()}
    out = lab.pack.nodes["TurboSampler"].execute(t2v, lab.positive(), latent, 0, 1, 0.0)[0]
    assert out["note"] == 1 and "downscale_ratio_spacial" not in out
    assert torch.equal(latent["samples"], before["samples"]) and latent.keys() == before.keys()


def test_empty_latent_of_another_model_is_mended(lab, t2v):
    """Four channels, no frames: EmptyLatentImage in front of the sampler works as with KSampler."""
    out = lab.turbo(t2v, {"samples": torch.zeros(1, 4, 8, 10), "downscale_ratio_spacial": 8}, steps=1)
    assert out.shape == (1, 16, 1, 8, 10)


def test_progress_and_previews(lab, experts, image, monkeypatch):
    """One bar over both experts: steps 0 to 3 of 4, each with an x0 of the latent's shape."""
    seen = []

    def prepare(model, steps, *args):
        return lambda step, x0, x, total: seen.append((step, total, steps, tuple(x0.shape)))

    monkeypatch.setattr(lab.pack.run.latent_preview, "prepare_callback", prepare)
    lab.turbo(experts[0], lab.latent(TINY_SHAPE), model_low=experts[1], positive=image)
    assert seen == [(i, 4, 4, TINY_SHAPE) for i in range(4)]


@pytest.mark.parametrize("when", ["first expert", "second expert"])
def test_interrupt_stops_within_a_step(comfy, lab, experts, image, when):
    """Cancel in the middle of an evaluation; the next run is as if nothing had been."""
    high, low = experts
    expected = lab.turbo(high, lab.latent(TINY_SHAPE), model_low=low, positive=image)
    victim = (high if when == "first expert" else low).clone()
    blocks = []

    def cancel(args, extra):
        blocks.append(args["transformer_options"]["block_index"])
        comfy.model_management.interrupt_current_processing()
        return extra["original_block"](args)

    victim.set_model_patch_replace(cancel, "dit", "double_block", 0)
    victim.set_model_patch_replace(lambda args, extra: blocks.append(1), "dit", "double_block", 1)
    pair = (victim, low) if when == "first expert" else (high, victim)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        lab.turbo(pair[0], lab.latent(TINY_SHAPE), model_low=pair[1], positive=image)
    assert blocks == [0], "stopped inside the first block"
    assert torch.equal(lab.turbo(high, lab.latent(TINY_SHAPE), model_low=low, positive=image), expected)


def test_interrupt_inside_a_quantized_block(comfy, lab):
    model = lab.load(QUANT)
    expected = lab.turbo(model, lab.latent(TINY_SHAPE))
    victim = model.clone()

    def cancel(args, extra):
        comfy.model_management.interrupt_current_processing()
        return extra["original_block"](args)

    victim.set_model_patch_replace(cancel, "dit", "double_block", 0)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        lab.turbo(victim, lab.latent(TINY_SHAPE))
    assert torch.equal(lab.turbo(model, lab.latent(TINY_SHAPE)), expected)


def test_a_dozen_rounds_do_not_grow(comfy, lab):
    """Load, quantize, sample, drop: no network stays behind, and memory settles."""
    import gc

    import psutil

    process, sizes = psutil.Process(), []
    for _ in range(12):
        model = lab.quantize(lab.attention(lab.load(), 0.5))
        lab.turbo(model, lab.latent(TINY_SHAPE), steps=1)
        del model
        comfy.model_management.cleanup_models()
        gc.collect()
        sizes.append(process.memory_info().rss)
    alive = [o for o in gc.get_objects() if issubclass(type(o), comfy.ldm.wan.model.WanModel)]
    growth = (max(sizes[9:]) - max(sizes[2:5])) / 2**20
    print("growth MiB", growth, "networks alive", len(alive))
    assert len(alive) <= 8, "those of the fixtures"
    assert growth < 9  # one round makes 9 + 4 MiB of weights: anything kept would be 80


def test_a_picture_may_come_as_a_reference(lab, experts):
    """HuMo has room for a picture and makes it of its reference by itself."""
    check = lab.pack.part("nodes.host.inputs").check_image
    with pytest.raises(ValueError, match="got no picture"):
        check(experts[0], lab.positive())
    check(experts[0], lab.positive(reference_latents=[lab.draw(*TINY_SHAPE, seed=20)]))


def test_the_schedule_is_for_flow_models(comfy):
    class Discrete(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
        pass

    with pytest.raises(ValueError, match="turbo_rcm is for flow models such as Wan, this is Discrete"):
        comfy.samplers.calculate_sigmas(Discrete(), "turbo_rcm", 4)


def advice(lab, monkeypatch):
    """nodes.reports.advice, to which the scheduler speaks: another copy of the pack may have registered it last."""
    import comfy.samplers

    part = lab.pack.part("nodes.reports.advice")
    name, handlers = "turbo_rcm", comfy.samplers.SCHEDULER_HANDLERS
    monkeypatch.setitem(handlers, name, handlers[name])  # put back at the end
    lab.pack.part("nodes.host.schedule").register_scheduler(part.tell_of_scheduler)
    return part


def test_another_sampler_than_its_own_is_told(lab, t2v, monkeypatch):
    """uni_pc asks for a step more and leaves one out: other times than the model was trained for."""
    part, said = advice(lab, monkeypatch), []
    monkeypatch.setattr(part, "warn", lambda *texts: said.extend(texts))
    for sampler, told in (("uni_pc", True), ("lcm", False), ("euler", False)):
        inputs = {"cfg": 1.0, "sampler_name": sampler, "denoise": 1.0}
        monkeypatch.setattr(part, "running", lambda inputs=inputs: ({"3": {"inputs": inputs}}, "3"))
        said.clear()
        ksample(lab, t2v, sampler=sampler)
        assert bool(said) == told and not any("steps:" in text for text in said)


def test_each_run_says_that_the_first_sigma_is_not_the_models_own(comfy, lab, experts, monkeypatch):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    part, said = advice(lab, monkeypatch), []
    monkeypatch.setattr(part, "warn", lambda *texts: said.extend(texts))
    replaced = ModelSamplingSD3().patch(experts[0], 5.0)[0].get_model_object("model_sampling")
    for _ in range(2):
        comfy.samplers.calculate_sigmas(replaced, "turbo_rcm", 4)
    assert len(said) == 2 and all("Image-to-video wants 200" in text for text in said)


def test_the_second_expert_must_be_distilled_too(lab, experts, image):
    from tests.helpers.lab import STOCK

    part = lab.pack.part("nodes.reports.advice")
    sigmas = lab.sigmas(4, model=experts[0])
    assert not any("distilled" in text for text in part.of_sampling(*experts, 0.9, sigmas))
    [told] = [text for text in part.of_sampling(experts[0], lab.load(STOCK), 0.9, sigmas) if "distilled" in text]
    assert "not known to be distilled" in told and experts[0].model is not None
