"""One clip from prompt to file, timed stage by stage: run in a process of its own by clip.py, which reads its JSON.

Ours is pipeline.generate. Beside it stands diffusers' WanPipeline with the same weights, the same noise, the same times
and the same file at the end; its text encoder is transformers'.
"""

import hashlib
import json
import sys
import time
from contextlib import contextmanager

import torch

from .. import checkpoint, pipeline
from ..devices import peak_memory, pick_device
from ..pipeline.sizes import latent_shape
from ..pipeline.text import encode_text, load_text_encoder
from ..pipeline.video import to_frames, write_video
from ..schedule import rcm_sigmas
from ..wan import Text, WanModel
from . import rivals
from .harness import Missing


def main() -> None:
    """Read a job from standard input, make its clip and print the times as the last line."""
    job = json.load(sys.stdin)
    born = time.time() - job["spawned"]
    torch.set_num_threads(job["threads"])
    try:
        found = MAKERS[job["maker"]](job)
    except Missing as reason:
        print(json.dumps({"missing": str(reason)}))
        return
    device = pick_device(job["device"])
    found["seconds"]["start"] = born
    frames, latents = found.pop("frames"), found.pop("latents")
    torch.save(latents.float().cpu(), job["kept"])
    digest = hashlib.sha256(frames.numpy().tobytes()).hexdigest()
    print(json.dumps(found | {"digest": digest[:16], "peak": peak_memory(device)}))


def ours(job) -> dict:
    """The clip by pipeline.generate."""
    made = pipeline.generate(
        job["prompt"], job["dit"], job["vae"], job["text"], size=(job["width"], job["height"]), frames=job["frames"],
        steps=job["steps"], topk=job["topk"], seed=job["seed"], device=job["device"],
    )  # fmt: skip
    seconds = {"load": 0.0, **made.seconds}
    for part in ("load VAE", "load DiT"):
        seconds["load"] += seconds.pop(part, 0.0)
    seconds["text"] = seconds.pop("text encoder")
    with _timed(seconds, "write"):
        write_video(job["output"], made.frames)
    return {"seconds": seconds, "steps": made.step_seconds, "frames": made.frames, "latents": made.latents}


def guided(job) -> dict:
    """The clip of a teacher by our network with guidance, decoded by diffusers."""
    from ..train import teacher

    device, dtype = _place(job)
    seconds, clock = {}, _Steps()
    with _timed(seconds, "load"):
        rivals.imported()
        state, described = checkpoint.load(job["dit"])
        model = WanModel.from_state_dict(state, dtype, device, num_heads=described.num_heads)
        vae = rivals.vae(job["vae"], device, dtype)
    with _timed(seconds, "text"):
        encoder, tokenize = load_text_encoder(job["text"], device=device, dtype=dtype)
        both = Text(encode_text(encoder, tokenize, [job["prompt"], ""]))
    with _timed(seconds, "sampling"):
        latents = teacher.sample(lambda _: model, noise(job)(), both, job["steps"], done=clock.step)
    with _timed(seconds, "decode"):
        frames = to_frames(rivals.decode(vae, latents))
    with _timed(seconds, "write"):
        write_video(job["output"], frames)
    return {"seconds": seconds, "steps": clock.seconds, "frames": frames, "latents": latents}


def theirs(job) -> dict:
    """The clip by diffusers alone."""
    from ..train import teacher

    seconds, clock = {}, _Steps()
    with _timed(seconds, "load"):
        pipe = rivals.wan_pipeline(job["dit"], job["vae"], job["text"], *_place(job))
    draw = noise(job)
    if job["guidance"] is None:
        pipe.scheduler = rivals.Schedule(rcm_sigmas(job["steps"]).tolist(), draw)
    else:
        at = teacher.shifted(torch.linspace(1, 0, job["steps"] + 1), teacher.SHIFT)
        pipe.scheduler = rivals.Schedule(at.tolist())
    with _timed(seconds, "text"):
        wish = pipe.encode_prompt(job["prompt"], "", job["guidance"] is not None, max_sequence_length=512)
    clock.begin()
    with _timed(seconds, "sampling"):
        latents = pipe(
            prompt_embeds=wish[0], negative_prompt_embeds=wish[1], height=job["height"], width=job["width"],
            num_frames=job["frames"], num_inference_steps=job["steps"], guidance_scale=job["guidance"] or 1.0,
            latents=draw() * pipe.scheduler.sigmas[0], output_type="latent",
            callback_on_step_end=lambda *_: clock.step() or {},
        ).frames  # fmt: skip
    with _timed(seconds, "decode"):
        frames = to_frames(rivals.decode(pipe.vae, latents))
    with _timed(seconds, "write"):
        write_video(job["output"], frames)
    return {"seconds": seconds, "steps": clock.seconds, "frames": frames, "latents": latents}


MAKERS = {"ours": ours, "guided": guided, "theirs": theirs}


def noise(job):
    """A function that draws the noise of a job, as pipeline.sample draws it."""
    generator = torch.Generator().manual_seed(job["seed"])
    shape = (1, 16, *latent_shape(job["width"], job["height"], job["frames"]))
    return lambda: torch.randn(shape, generator=generator).to(pick_device(job["device"]))


def _place(job):
    """(device, dtype) as the pipeline takes them."""
    device = pick_device(job["device"])
    return device, torch.float32 if device.type == "cpu" else torch.bfloat16


class _Steps:
    """Seconds between calls."""

    def __init__(self):
        self.seconds = []
        self.begin()

    def begin(self):
        self.last = time.perf_counter()

    def step(self):
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


@contextmanager
def _timed(seconds, name):
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


if __name__ == "__main__":
    main()
