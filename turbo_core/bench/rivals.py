"""What others offer for the same work: diffusers' Wan pipeline with the weights of our files and ComfyUI's VAE, for
`turbo-core bench clip`, and comfy_kitchen's functions."""

import os
import sys

import torch

from .. import checkpoint
from ..checkpoint.others.diffusers import official_name
from ..pipeline.text import PAD, TABLE, TEXT_LENGTH, load_text_encoder
from ..vae import LATENT_CHANNELS, LATENT_MEAN, LATENT_STD, load_vae
from ..vae.files import diffusers_name
from .harness import Missing


def imported():
    """(diffusers, transformers); raises Missing where one is not installed."""
    try:
        import diffusers
        import transformers
    except ImportError as error:
        raise Missing(f"{error.name} is not installed") from error
    return diffusers, transformers


def kitchen(device, name):
    """A function of comfy_kitchen that this device can run; raises Missing where there is none."""
    try:
        import comfy_kitchen
    except ImportError:
        raise Missing("comfy_kitchen is not installed") from None
    if not hasattr(comfy_kitchen, name):
        import importlib.metadata as metadata

        raise Missing(f"comfy_kitchen {metadata.version('comfy-kitchen')} has no {name}")
    available = getattr(comfy_kitchen, f"{name}_is_available", None)
    if device.type != "cuda" or (available and not available(device)):
        raise Missing(f"comfy_kitchen.{name} does not run on {device.type} here")
    return getattr(comfy_kitchen, name)


def wan_pipeline(dit, vae_file, text, device, dtype):
    """WanPipeline of a float text-to-video checkpoint, a VAE and a text encoder; its scheduler is yet to be given."""
    diffusers, transformers = imported()
    encoder, tokenize = load_text_encoder(text, device=device, dtype=dtype)
    parts = {
        "transformer": transformer(diffusers, dit).to(device, dtype),
        "vae": vae(vae_file, device, dtype),
        "text_encoder": text_encoder(transformers, encoder).to(device, dtype),
        "tokenizer": Tokenizer(tokenize),
    }
    pipe = diffusers.WanPipeline(**parts, scheduler=Schedule([1.0, 0.0]))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def transformer(diffusers, path):
    """WanTransformer3DModel, float32, of a checkpoint with float weights."""
    state, described = checkpoint.load(path)
    sizes = {
        "num_attention_heads": described.num_heads,
        "attention_head_dim": described.dim // described.num_heads,
        "in_channels": described.in_dim,
        "out_channels": described.out_dim,
        "text_dim": described.text_dim,
        "ffn_dim": described.ffn_dim,
        "num_layers": described.num_layers,
    }
    model = diffusers.WanTransformer3DModel(**sizes).eval().requires_grad_(False)
    model.load_state_dict({name: state[official_name(name)].float() for name in model.state_dict()})
    return model


def text_encoder(transformers, ours):
    """UMT5EncoderModel with the weights of our encoder."""
    first, blocks = ours.encoder.block[0], ours.encoder.block
    config = transformers.UMT5Config(
        vocab_size=len(ours.shared.weight),
        d_model=ours.shared.weight.shape[1],
        d_kv=first.layer[0].SelfAttention["q"].out_features // first.layer[0].heads,
        d_ff=first.layer[1].DenseReluDense["wo"].in_features,
        num_layers=len(blocks),
        num_heads=first.layer[0].heads,
        feed_forward_proj="gated-gelu",
    )
    model = transformers.UMT5EncoderModel(config).eval().requires_grad_(False)
    state = ours.state_dict() | {TABLE: ours.shared.weight}
    model.load_state_dict(state, strict=False)  # it holds the table of tokens under a second name
    return model


class Tokenizer:
    """Our tokenizer as WanPipeline calls one."""

    def __init__(self, tokenize):
        self.tokenize = tokenize

    def __call__(self, prompts, **_):
        from transformers import BatchEncoding

        ids = torch.full((len(prompts), TEXT_LENGTH), PAD)
        for row, prompt in zip(ids, prompts):
            own = self.tokenize(prompt)[:TEXT_LENGTH]
            row[: len(own)] = torch.tensor(own)
        return BatchEncoding({"input_ids": ids, "attention_mask": (ids != PAD).long()})


class Schedule:
    """Euler's steps from time to time of a rectified flow, with the attributes that WanPipeline asks a scheduler for.
    draw: fresh noise for each step, as rCM's students are sampled; None for none."""

    order = 1

    def __init__(self, times: list[float], draw=None):
        self.sigmas, self.draw = times, draw

    def set_timesteps(self, count, device):
        assert count == len(self.sigmas) - 1
        at = 1000 * torch.tensor(self.sigmas[:-1], device=device)
        # what the students were trained to see, see pipeline.sampling
        self.timesteps, self.done = at if self.draw is None else at.to(torch.bfloat16).float(), 0

    def set_begin_index(self, index):
        self.done = index

    def step(self, velocity, t, x, return_dict=False):
        now, after = self.sigmas[self.done : self.done + 2]
        self.done += 1
        if self.draw is None:
            return (x + (after - now) * velocity,)
        clean = x - now * velocity
        return ((1 - after) * clean + after * self.draw() if after else clean,)


def vae(path, device, dtype):
    """AutoencoderKLWan with the weights of a Wan 2.1 VAE file."""
    ours = load_vae(path, device, dtype)
    model = imported()[0].AutoencoderKLWan(base_dim=ours.dim, z_dim=LATENT_CHANNELS).eval().requires_grad_(False)
    state = {diffusers_name(name): value for name, value in ours.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


def host_vae(path, device):
    """The VAE of a file as ComfyUI loads it; COMFYUI_DIR names ComfyUI's folder, which is on the path of Python too."""
    if not os.path.isdir(os.path.join(os.environ.get("COMFYUI_DIR", ""), "comfy")):
        raise Missing("no ComfyUI: COMFYUI_DIR names its folder")
    sys.argv[1:] = ["--cpu"] if device.type == "cpu" else []
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.sd
        import comfy.utils
    except ImportError as error:
        raise Missing(f"ComfyUI is there, its {error.name} is not installed") from error
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))


def host_decode(vae, latents):
    """Video float [3, T, H, W] of latents [1, 16, T, H, W], as ComfyUI's VAE Decode decodes them."""
    mean, std = (torch.tensor(row).view(1, -1, 1, 1, 1) for row in (LATENT_MEAN, LATENT_STD))
    return vae.decode(latents.float().cpu() * std + mean)[0].permute(3, 0, 1, 2).float() * 2 - 1


@torch.no_grad()
def decode(vae, latents):
    """Video float [3, T, H, W] of latents [1, 16, T, H, W], as WanPipeline decodes them."""
    mean, std = (torch.tensor(row, device=latents.device).view(1, -1, 1, 1, 1) for row in (LATENT_MEAN, LATENT_STD))
    return vae.decode((latents.float() * std + mean).to(vae.dtype)).sample[0].float()
