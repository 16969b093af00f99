"""The prompts of the soak test: two-stage and one-stage, quantized on the fly, with and without LoRA, from a seed."""

import random
from dataclasses import dataclass

from tests.helpers.comfyui import LORAS

KINDS = ("t2v_ksampler", "t2v_turbo", "i2v_experts", "quantize_stock")
TEXT = "A red circle drifts slowly across a calm blue sea at sunset."
SMALL = (80, 48, 9)
LARGE = (240, 144, 13)  # a step takes long enough here for an interrupt to arrive within it


@dataclass(frozen=True)
class Job:
    """One prompt; two jobs that are equal must have the same latents and the same frames."""

    kind: str
    lora: bool
    seed: int
    size: tuple = SMALL

    def name(self):
        return f"{self.kind}{'+lora' if self.lora else ''}, seed {self.seed}, {'x'.join(map(str, self.size))}"


def schedule(runs, seed=0, every=5):
    """[(Job, step to interrupt at or None)]: each kind with and without LoRA once in every eight runs.

    The first eight are large, as the allocator keeps what was once needed. After them about one in `every` is large
    and to be interrupted, at step 0 (the sampler has begun) to 3 (one step is left).
    """
    draw, jobs = random.Random(seed), []
    combinations = [(kind, lora) for kind in KINDS for lora in (False, True)]
    while len(jobs) < runs:
        variant = len(jobs) // len(combinations) % 3  # never what the host has in its cache from the run before
        for kind, lora in draw.sample(combinations, len(combinations)):
            first = len(jobs) < len(combinations)
            interrupt = draw.randrange(4) if not first and draw.randrange(every) == 0 else None
            large = first or interrupt is not None
            jobs.append((Job(kind, lora, variant, LARGE if large else SMALL), interrupt))
    return jobs[:runs]


def _node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def _turbo(graph, source, lora):
    """Adds TurboLoader and, where asked for, a LoRA; returns the link to the MODEL."""
    name = f"model{len(graph)}"
    graph[name] = _node("TurboLoader", model_name=source, dtype="default")
    if lora:
        file = LORAS[0].removeprefix("loras/")
        graph[f"{name} lora"] = _node("LoraLoaderModelOnly", model=[name, 0], lora_name=file, strength_model=0.7)
        name += " lora"
    return [name, 0]


def prompt(job, output):
    """The "prompt" of a /prompt request; it writes a latent and PNG frames under names that begin with output."""
    width, height, length = job.size
    graph = {
        "clip": _node("TurboTextEncoderLoader", text_encoder="umt5_xxl_fp8_e4m3fn_scaled.safetensors"),
        "vae": _node("VAELoader", vae_name="wan_2.1_vae.safetensors"),
        "text": _node("CLIPTextEncode", clip=["clip", 0], text=TEXT),
        "none": _node("ConditioningZeroOut", conditioning=["text", 0]),
        "decode": _node("VAEDecode", samples=["sample", 0], vae=["vae", 0]),
        "latent file": _node("SaveLatent", samples=["sample", 0], filename_prefix=output),
        "frames file": _node("SaveImage", images=["decode", 0], filename_prefix=output),
    }
    size = {"width": width, "height": height, "length": length, "batch_size": 1}
    turbo = {"seed": job.seed, "steps": 4, "sigma_max": 0.0, "mode": "SDE", "boundary": 0.9}
    plain = {"seed": job.seed, "steps": 4, "cfg": 1.0, "sampler_name": "lcm", "scheduler": "turbo_rcm", "denoise": 1.0}
    positive, latent = ["text", 0], ["latent", 0]
    graph["latent"] = _node("EmptyHunyuanLatentVideo", **size)
    if job.kind == "i2v_experts":
        graph["picture"] = _node("LoadImage", image="example.png")
        graph["latent"] = _node(
            "WanImageToVideo", positive=positive, negative=["none", 0], vae=["vae", 0],
            start_image=["picture", 0], **size,
        )  # fmt: skip
        high, low = (
            _turbo(graph, f"TurboWan2.2-I2V-A14B-{expert}-720P-quant.pth", job.lora) for expert in ("high", "low")
        )
        graph["sample"] = _node(
            "TurboSampler", model=high, model_low=low, positive=latent, latent_image=["latent", 2], **turbo
        )
        return graph
    sources = {
        "t2v_ksampler": "TurboWan2.1-T2V-1.3B-480P-quant.pth",
        "t2v_turbo": "TurboWan2.1-T2V-1.3B-480P.pth",
        "quantize_stock": "wan2.1_t2v_14B_bf16.safetensors",
    }
    model = _turbo(graph, sources[job.kind], job.lora)
    if job.kind == "quantize_stock":
        graph["int8"] = _node("QuantizeW8A8", model=model, format="block (TurboWan)", layers="all")
        settings = {"mode": "auto", "start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0}
        graph["sparse"] = _node(
            "SparseLowBitAttention", model=["int8", 0], topk=0.3, precision="bf16", verbose=False, **settings
        )
        model = ["sparse", 0]
    if job.kind == "t2v_turbo":
        graph["sample"] = _node("TurboSampler", model=model, positive=positive, latent_image=latent, **turbo)
    else:
        graph["sample"] = _node(
            "KSampler", model=model, positive=positive, negative=["none", 0], latent_image=latent, **plain
        )
    return graph
