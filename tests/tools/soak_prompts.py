"""The prompts of the soak test, from a seed: samplers, experts, batches, quantized on the fly, with and without LoRA,
conversions of files, and wrong inputs between them."""

import random
import shutil
from dataclasses import dataclass

import torch

from tests.helpers.comfyui import LORAS
from tests.helpers.pickles import Call, Global, pickled, zipped

KINDS = ("t2v_ksampler", "t2v_turbo", "i2v_experts", "quantize_stock", "batch")
FORMATS = ("int8_row", "bf16", "fp8")  # that conversions write in turn
# {what is wrong: words that the answer must hold}, also as names of prompts
WRONG = {
    "cut": "cut short",
    "code": "was refused",
    "nan": "NaN",
    "gone": "was not found in models",
    "topk": "value_bigger_than_max",
    "experts": "model_low",
    "encoder": "not a umT5 encoder",
    "outside": "lies outside",
}
TEXT = "A red circle drifts slowly across a calm blue sea at sunset."
SMALL = (80, 48, 9)
LARGE = (240, 144, 13)  # a step takes long enough here for an interrupt to arrive within it


@dataclass(frozen=True)
class Job:
    """One prompt; two jobs that are equal must have the same latents and the same frames."""

    kind: str  # one of KINDS, "convert" or one of WRONG
    lora: bool
    seed: int
    size: tuple = SMALL

    def name(self):
        if self.kind == "convert":
            return f"convert to {FORMATS[self.seed]}"
        if self.kind in WRONG:
            return f"wrong: {self.kind}"
        return f"{self.kind}{'+lora' if self.lora else ''}, seed {self.seed}, {'x'.join(map(str, self.size))}"


def schedule(runs, seed=0, every=5):
    """[(Job, interrupt or None)]: in every round each kind with and without LoRA, a conversion and two wrong inputs.

    The first round is large, as the allocator keeps what was once needed. After it about one in `every` is large and
    to be interrupted: half of these at a step, 0 (the sampler has begun) to 3 (one step is left), the others at a
    random moment, in seconds as a float, which may come too late.
    """
    draw, jobs, wrong = random.Random(seed), [], list(WRONG)
    for variant in range(runs):
        variant %= 3  # never what the host has in its cache from the run before
        turn = [Job(kind, lora, variant) for kind in KINDS for lora in (False, True)]
        turn += [Job("convert", False, variant), *(Job(kind, False, 0) for kind in wrong[:2])]
        wrong = wrong[2:] + wrong[:2]
        first = not jobs
        for job in draw.sample(turn, len(turn)):
            interrupt = None
            if not first and job.kind not in WRONG and draw.randrange(every) == 0:
                interrupt = _moment(draw, job)
            if job.kind in KINDS and (first or interrupt is not None):
                job = Job(job.kind, job.lora, job.seed, LARGE)
            jobs.append((job, interrupt))
        if len(jobs) >= runs:
            break
    return jobs[:runs]


def _moment(draw, job):
    if job.kind == "convert":
        return draw.uniform(0, 0.3)
    return draw.randrange(4) if draw.random() < 0.5 else draw.uniform(0, 6)


def put_wrong(models):
    """Write the wrong files to the host's folder `models`: cut short, one that names code, one with a NaN, a VAE that
    is said to be a text encoder."""
    folder = models / "diffusion_models"
    good = (folder / "TurboWan2.1-T2V-1.3B-480P.pth").read_bytes()
    (folder / "cut.pth").write_bytes(good[: len(good) // 2])
    zipped(folder / "code.pth", pickled({"head.modulation": Call(Global("os", "system"), ("true",))}), {})
    state = torch.load(folder / "TurboWan2.1-T2V-1.3B-480P-quant.pth", weights_only=True)
    state["blocks.0.ffn.0.scale"].fill_(float("nan"))
    torch.save(state, folder / "nan.pth")
    shutil.copy(models / "vae" / "wan_2.1_vae.safetensors", models / "text_encoders" / "vae.safetensors")


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
    """The "prompt" of a /prompt request; it writes a latent and PNG frames, or a model, under names that begin with
    output."""
    if job.kind in ("convert", "outside"):
        source = {"source": "TurboWan2.1-T2V-1.3B-480P.pth", "format": FORMATS[job.seed], "overwrite": False}
        name = output if job.kind == "convert" else "../../outside"
        return {"convert": _node("TurboConvert", filename=name, **source)}
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
    batch = 2 if job.kind == "batch" else 1
    size = {"width": width, "height": height, "length": length, "batch_size": batch}
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
        "topk": "wan2.1_t2v_14B_bf16.safetensors",
        **{kind: f"{kind}.pth" for kind in ("cut", "code", "nan", "gone")},
    }
    model = _turbo(graph, sources.get(job.kind, sources["t2v_turbo"]), job.lora)
    if job.kind in ("quantize_stock", "topk"):
        graph["int8"] = _node("QuantizeW8A8", model=model, format="block (TurboWan)", layers="all")
        settings = {"mode": "auto", "start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0}
        graph["sparse"] = _node(
            "SparseLowBitAttention",
            model=["int8", 0],
            topk=7.0 if job.kind == "topk" else 0.3,
            precision="bf16",
            verbose=False,
            **settings,
        )
        model = ["sparse", 0]
    if job.kind == "encoder":
        graph["clip"]["inputs"]["text_encoder"] = "vae.safetensors"
    if job.kind == "experts":  # of another family
        turbo["model_low"] = _turbo(graph, "TurboWan2.2-I2V-A14B-low-720P-quant.pth", False)
    if job.kind in ("t2v_turbo", "batch", "encoder", "experts"):
        graph["sample"] = _node("TurboSampler", model=model, positive=positive, latent_image=latent, **turbo)
    else:
        graph["sample"] = _node(
            "KSampler", model=model, positive=positive, negative=["none", 0], latent_image=latent, **plain
        )
    return graph
