"""Prompt, and image, to video without ComfyUI: text encoder, VAE, few-step sampling with one or two experts.

Only one of the large networks is in memory at a time: the text encoder is gone before the DiT is read, the high-noise
expert before the low-noise one. Each file is opened once; the diffusion models are validated before anything computes.
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..devices import peak_memory, pick_device, release, reset_peak_memory, synchronize, widest_float
from ..errors import TurboError
from ..sampler import sample_rcm
from ..schedule import default_sigma_max, rcm_sigmas
from ..selfcheck import prove
from ..wan import Text
from . import sizes
from .handover import Experts
from .inputs import check_sampling, check_wish, open_models
from .text import encode_text, load_text_encoder
from .vae import LATENT_CHANNELS, decode_video, encode_video, load_vae
from .video import prepare_image, read_image, to_frames


@dataclass
class Result:
    """A finished video and how it came about; times in seconds, memory in bytes."""

    frames: torch.Tensor  # uint8 [T, H, W, 3]
    latents: torch.Tensor  # float32 [1, 16, (T-1)/4+1, H/8, W/8], normalized
    settings: dict
    seconds: dict[str, float] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    peak_memory: dict[str, int] = field(default_factory=dict)


@torch.inference_mode()
def generate(
    prompt: str,
    dit,
    vae,
    text_encoder,
    *,
    dit_low=None,
    tokenizer=None,
    image=None,
    size=(832, 480),
    adaptive=False,
    frames=81,
    steps=4,
    seed=0,
    sigma_max=None,
    topk="auto",
    precision="bf16",
    ode=False,
    boundary=0.9,
    device=None,
    dtype=None,
    noise_device="cpu",
    tiled=False,
    described=None,
    progress=None,
) -> Result:
    """Make one video.

    dit, dit_low, vae, text_encoder, tokenizer, image: paths; dit_low is the low-noise expert, used from the first
    sigma below boundary. size: (width, height), multiples of 16; adaptive keeps its area and takes the image's aspect
    ratio. frames: 4n + 1. steps: 1 to 4. sigma_max: default 80 (T2V) or 200 (I2V). topk: fraction of key blocks for
    sparse-linear attention, None for dense attention, "auto" for 0.1 where the checkpoint was trained so and dense
    elsewhere. precision: of sparse attention, "bf16" or "int8". device: default CUDA, then MPS, then CPU. dtype:
    default bfloat16, on a CPU float32. noise_device: where noise is drawn; "cpu" gives the same video on every
    machine, "cuda" the noise of the reference. tiled: decode in tiles. described: callable (Description of dit), once
    the models are known to fit together. progress: callable (stage, done, total).
    Raises TurboError for anything that does not fit together.
    """
    device = pick_device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    check_wish(prompt, seed)
    files = open_models(dit, dit_low, image)
    model = files[0].description
    sigmas = rcm_sigmas(steps, default_sigma_max(model.in_dim) if sigma_max is None else sigma_max)
    topk = check_sampling(model, dit_low, sigmas, boundary, topk, precision)
    picture = None if image is None else read_image(image)
    width, height = size
    if adaptive and picture is not None:
        width, height = sizes.adaptive_size(picture.shape[2], picture.shape[1], width, height)
    shape = (1, LATENT_CHANNELS, *sizes.latent_shape(width, height, frames))
    if described is not None:
        described(model)
    progress = progress or (lambda stage, done, total: None)
    seconds, step_seconds = {}, []
    stage = _stages(seconds, progress)
    reset_peak_memory(device)

    with stage("load VAE"):
        vae = load_vae(vae, "cpu", dtype)
    with stage("text encoder"):
        context = encode_prompt(prompt, text_encoder, tokenizer, device, dtype)
    if context.shape[-1] != model.text_dim:
        raise TurboError(
            f"text encoder {text_encoder} gives {context.shape[-1]} numbers a token, {dit} expects {model.text_dim}: "
            "use umT5-xxl with the published models."
        )
    prove(device)  # before weights fill its memory
    y = None
    if picture is not None:
        with stage("encode image"):
            y = encode_image(vae.to(device), prepare_image(picture, width, height), frames).to(dtype)
            vae.to("cpu")
            release(device)
    experts = Experts(files, boundary, sigmas, device, dtype, stage)
    del files  # see Experts
    try:
        with stage("sampling", steps):
            latents = sample(
                experts.at, context, shape, sigmas, y=y, seed=seed, topk=topk, precision=precision, ode=ode,
                device=device, noise_device=noise_device, step_seconds=step_seconds,
                progress=lambda i: progress("sampling", i, steps),
            )  # fmt: skip
    finally:
        experts.free()
    seconds["sampling"] -= seconds.get("load DiT", 0.0)
    if not torch.isfinite(latents).all():
        raise TurboError(f"Sampling gave NaN or infinity in {dtype}. Use --dtype bfloat16 or float32, or another file.")
    with stage("decode"):
        video = decode_video(vae.to(device), latents, tiled)[0]
        if not torch.isfinite(video).all():
            raise TurboError(f"Decoding gave NaN or infinity in {dtype}. Use --dtype float32, or another VAE file.")
        video = to_frames(video)
    settings = {
        "prompt": prompt, "model": model.family, "size": f"{width}x{height}", "frames": frames, "steps": steps,
        "sigmas": [round(sigma, 6) for sigma in sigmas.tolist()], "rule": "ode" if ode else "sde", "seed": seed,
        "topk": topk, "precision": precision, "boundary": boundary if dit_low else None, "weights": model.format,
        "device": str(device), "dtype": str(dtype).removeprefix("torch."), "noise_device": str(noise_device),
    }  # fmt: skip
    return Result(video, latents.cpu(), settings, seconds, step_seconds, peak_memory(device))


def encode_prompt(prompt: str, text_encoder, tokenizer=None, device="cpu", dtype=torch.float32) -> torch.Tensor:
    """Embeddings [1, 512, text_dim]; the text encoder is loaded and freed again."""
    model, tokenize = load_text_encoder(text_encoder, tokenizer, device, dtype)
    context = encode_text(model, tokenize, [prompt])
    del model
    release(torch.device(device))
    return context


def encode_image(vae, image: torch.Tensor, frames: int) -> torch.Tensor:
    """Conditioning [1, 20, T, H/8, W/8] float32 for a 36-channel model from an image [3, H, W] in [-1, 1].

    4 mask channels, one on the first latent frame, then the latents of a clip that is the image and then grey (0).
    """
    clip = image.new_zeros(1, 3, frames, *image.shape[1:])
    clip[0, :, 0] = image
    latent = encode_video(vae, clip)
    mask = torch.zeros_like(latent[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, latent], 1)


def sample(
    model_at,
    context: torch.Tensor,
    shape,
    sigmas: torch.Tensor,
    *,
    y=None,
    seed=0,
    topk=None,
    precision="bf16",
    ode=False,
    device="cpu",
    noise_device="cpu",
    step_seconds=None,
    progress=None,
) -> torch.Tensor:
    """Latents float32 of this shape [B, 16, T, H, W]; one generator supplies all noise, through expert changes too.

    model_at: callable (sigma) -> WanModel. The state is float64 (float32 on MPS). The network gets the timestep
    1000 * sigma rounded to bfloat16 in every dtype: that is the value the distilled student was trained to see.
    step_seconds: a list that takes the time of each network evaluation. progress: callable (steps done).
    """
    generator = torch.Generator(noise_device).manual_seed(seed)
    device = torch.device(device)
    text = None if context is None else Text(context)

    def noise(*_):
        return torch.randn(shape, generator=generator, device=noise_device).to(device)

    def denoise(x, sigma):
        model = model_at(sigma[0].item())
        start = time.perf_counter()
        timestep = (sigma.float() * 1000).to(torch.bfloat16).float()
        velocity = model(x.float(), timestep, text, y=y, topk=topk, precision=precision)
        synchronize(device)
        if step_seconds is not None:
            step_seconds.append(time.perf_counter() - start)
        return x - sigma.view(-1, 1, 1, 1, 1) * velocity.to(x.dtype)

    state_dtype = widest_float(device)
    callback = (lambda event: progress(event["i"] + 1)) if progress else None
    x = noise().to(state_dtype) * sigmas[0].item()
    return sample_rcm(denoise, x, sigmas, ode=ode, noise_sampler=noise, callback=callback).float()


def _stages(seconds: dict, progress):
    """A context manager that times a named stage (summed when it comes twice) and reports its start and end."""

    @contextmanager
    def stage(name: str, total: int = 1):
        progress(name, 0, total)
        start = time.perf_counter()
        yield
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        progress(name, total, total)

    return stage
