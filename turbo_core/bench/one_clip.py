"""One clip from prompt to file, timed stage by stage: run in a process of its own by clip.py, which reads its JSON.

Ours is pipeline.generate. Beside it stands diffusers' WanPipeline with the same weights, the same noise, the same times
and the same file at the end; its text encoder is transformers'.
"""

import gc
import hashlib
import json
import sys
import time
from contextlib import contextmanager

import torch

from .. import checkpoint, pipeline
from ..devices import peak_memory, pick_device, synchronize
from ..pipeline.sizes import latent_shape
from ..pipeline.text import encode_text, load_text_encoder
from ..pipeline.video import to_frames, write_video
from ..schedule import rcm_sigmas
from ..selfcheck import prove
from ..vae import LATENT_CHANNELS
from ..wan import Text, WanModel
from . import rivals
from .harness import Missing

CPU_TIME, WALL = "CPU time", "wall clock"


def main() -> None:
    """Read a job from standard input, make its clip and print the times as the last line."""
    job = json.load(sys.stdin)
    clock = Clock(job)
    gc.freeze()  # as turbo-core generate does
    torch.set_num_threads(job["threads"])
    try:
        frames, latents = MAKERS[job["maker"]](job, clock)
    except Missing as reason:
        print(json.dumps({"missing": str(reason)}))
        return
    torch.save(latents.float().cpu(), job["kept"])
    digest = hashlib.sha256(frames.numpy().tobytes()).hexdigest()
    told = {"seconds": clock.seconds, "steps": clock.steps, "digest": digest[:16]}
    print(json.dumps(told | {"peak": peak_memory(pick_device(job["device"]))}))


class Clock:
    """Seconds of each stage and step, of what this process computed where it is one thread of a CPU, else as a clock on
    the wall; "start" is what has gone by since the process was made."""

    def __init__(self, job):
        self.device = pick_device(job["device"])
        self.read = time.process_time if job["clock"] == CPU_TIME else time.perf_counter
        began = time.process_time() if job["clock"] == CPU_TIME else time.time() - job["spawned"]
        self.seconds, self.steps, self.marks = {"start": began}, [], {}

    @contextmanager
    def stage(self, name):
        start = self.read()
        yield
        synchronize(self.device)  # on a card a call returns before its work is done
        self.seconds[name] = self.seconds.get(name, 0.0) + self.read() - start

    def follow(self, names):
        """A progress callback for our pipeline, which reads a second expert within sampling. names: {stage there:
        here}."""

        def told(stage, done, total):
            now = self.read()
            if done == 0:
                self.marks[stage] = now
                self.step_begins()
            if stage not in self.marks or done == 0:
                return
            if stage == "sampling":
                self.step()
            if done == total:
                spent = now - self.marks.pop(stage)
                name = names.get(stage, stage)
                self.seconds[name] = self.seconds.get(name, 0.0) + spent
                if stage == "load DiT" and "sampling" in self.marks:
                    self.marks["sampling"] += spent
                    self.step_begins()

        return told

    def step_begins(self):
        self.last = self.read()

    def step(self, *_):
        synchronize(self.device)
        self.steps.append(self.read() - self.last)
        self.step_begins()
        return {}


def ours(job, clock):
    """(frames, latents) of the clip by pipeline.generate."""
    names = {"load VAE": "load", "load DiT": "load", "text encoder": "text"}
    made = pipeline.generate(
        job["prompt"], job["dit"], job["vae"], job["text"], size=(job["width"], job["height"]), frames=job["frames"],
        steps=job["steps"], topk=job["topk"], seed=job["seed"], device=job["device"], progress=clock.follow(names),
    )  # fmt: skip
    with clock.stage("write"):
        write_video(job["output"], made.frames)
    return made.frames, made.latents


def guided(job, clock):
    """(frames, latents) of the clip of a teacher by our network with guidance, decoded by diffusers."""
    from ..train import teacher

    device, dtype = _place(job)
    with clock.stage("load"):
        rivals.imported()
        state, described = checkpoint.load(job["dit"])
        model = WanModel.from_state_dict(state, dtype, device, num_heads=described.num_heads)
        prove(device)
        vae = rivals.vae(job["vae"], device, dtype)
    with clock.stage("text"):
        encoder, tokenize = load_text_encoder(job["text"], device=device, dtype=dtype)
        both = Text(encode_text(encoder, tokenize, [job["prompt"], ""]))
    clock.step_begins()
    with clock.stage("sampling"):
        latents = teacher.sample(lambda _: model, noise(job)(), both, job["steps"], done=clock.step)
    with clock.stage("decode"):
        frames = to_frames(rivals.decode(vae, latents))
    with clock.stage("write"):
        write_video(job["output"], frames)
    return frames, latents


def hosted(job, clock):
    """(frames, latents) of the clip by our network, decoded by ComfyUI's VAE."""
    device, dtype = _place(job)
    with clock.stage("load"):
        vae = rivals.host_vae(job["vae"], device)
        state, described = checkpoint.load(job["dit"])
        model = WanModel.from_state_dict(state, dtype, device, num_heads=described.num_heads)
        prove(device)
    with clock.stage("text"):
        encoder, tokenize = load_text_encoder(job["text"], device=device, dtype=dtype)
        context = encode_text(encoder, tokenize, [job["prompt"]])
    clock.step_begins()
    with clock.stage("sampling"), torch.inference_mode():
        shape = (1, LATENT_CHANNELS, *latent_shape(job["width"], job["height"], job["frames"]))
        latents = pipeline.sample(
            lambda _: model, context, shape, rcm_sigmas(job["steps"]), progress=clock.step, seed=job["seed"],
            device=device,
        )  # fmt: skip
    with clock.stage("decode"):
        frames = to_frames(rivals.host_decode(vae, latents))
    with clock.stage("write"):
        write_video(job["output"], frames)
    return frames, latents


def theirs(job, clock):
    """(frames, latents) of the clip by diffusers alone."""
    from ..train import teacher

    with clock.stage("load"):
        pipe = rivals.wan_pipeline(job["dit"], job["vae"], job["text"], *_place(job))
    draw = noise(job)
    if job["guidance"] is None:
        pipe.scheduler = rivals.Schedule(rcm_sigmas(job["steps"]).tolist(), draw)
    else:
        at = teacher.shifted(torch.linspace(1, 0, job["steps"] + 1), teacher.SHIFT)
        pipe.scheduler = rivals.Schedule(at.tolist())
    with clock.stage("text"):
        wish = pipe.encode_prompt(job["prompt"], "", job["guidance"] is not None, max_sequence_length=512)
    clock.step_begins()
    with clock.stage("sampling"):
        latents = pipe(
            prompt_embeds=wish[0], negative_prompt_embeds=wish[1], height=job["height"], width=job["width"],
            num_frames=job["frames"], num_inference_steps=job["steps"], guidance_scale=job["guidance"] or 1.0,
            latents=draw() * pipe.scheduler.sigmas[0], output_type="latent",
            callback_on_step_end=clock.step,
        ).frames  # fmt: skip
    with clock.stage("decode"):
        frames = to_frames(rivals.decode(pipe.vae, latents))
    with clock.stage("write"):
        write_video(job["output"], frames)
    return frames, latents


MAKERS = {"ours": ours, "guided": guided, "hosted": hosted, "theirs": theirs}


def noise(job):
    """A function that draws the noise of a job, as pipeline.sample draws it."""
    generator = torch.Generator().manual_seed(job["seed"])
    shape = (1, LATENT_CHANNELS, *latent_shape(job["width"], job["height"], job["frames"]))
    return lambda: torch.randn(shape, generator=generator).to(pick_device(job["device"]))


def _place(job):
    """(device, dtype) as the pipeline takes them."""
    device = pick_device(job["device"])
    return device, torch.float32 if device.type == "cpu" else torch.bfloat16


if __name__ == "__main__":
    main()
