"""The verb generate of turbo-core: prompt, and image, to video."""

import contextlib
import gc
import json
import sys
import time
from pathlib import Path

from ..errors import TurboError
from .processes import add_parallel, in_team

PRECISIONS = ("bf16", "int8")
DTYPES = ("bfloat16", "float16", "float32")


def add_verbs(verbs, common) -> None:
    """Add generate to the parser's verbs; common: the parent parser with what all verbs take."""
    command = verbs.add_parser("generate", parents=[common], help="prompt (and image) to video")
    add = command.add_argument
    add("--prompt", required=True, help="long English descriptions work best")
    add("--image", type=Path, help="first frame, for image-to-video")
    add_models(command)
    add("-o", "--output", type=Path, required=True, help="the video, *.mp4")
    add("--contact-sheet", type=Path, metavar="PNG", help="also write a grid of frames")
    add("--json", type=Path, metavar="FILE", help="also write settings, times and memory")
    add_settings(command)
    add("--cache", type=Path, metavar="DIR", help="keep embeddings of prompts here: the next time no encoder is read")
    add_parallel(command)
    command.set_defaults(run=run_generate)


def add_models(command) -> None:
    """The files and the device, for every verb that makes videos."""
    add = command.add_argument
    add("--dit", type=Path, required=True, help="TurboWan checkpoint; of an A14B pair the high-noise one")
    add("--dit-low", type=Path, help="the low-noise expert of an A14B pair")
    add("--vae", type=Path, required=True, help="Wan2.1_VAE.pth or wan_2.1_vae.safetensors")
    add("--vae-fast", type=Path, metavar="FILE", help="decode drafts by taew2_1, lighttaew2_1 or lightvaew2_1 instead")
    add("--text-encoder", type=Path, required=True, help="models_t5_umt5-xxl-enc-bf16.pth or umt5_xxl_*.safetensors")
    add("--tokenizer", type=Path, help="spiece.model, tokenizer.json or their folder; needed when the file has none")
    add("--device", help="cuda, cuda:1, mps, cpu; default the best there is")
    add("--dtype", choices=DTYPES, help="default bfloat16, on a CPU float32")
    add("--no-metadata", action="store_true", help="write nothing into the video of how it was made")
    add("--sign", nargs=2, type=Path, metavar=("CERT", "KEY"), help="C2PA content credentials, by PEM files")


def add_settings(command) -> None:
    """What a video is made by, for every verb that makes videos."""
    add = command.add_argument
    add("--size", default="832x480", help="WIDTHxHEIGHT, 480p, 720p-9:16 ...; default %(default)s")
    add("--adaptive", action="store_true", help="keep the image's aspect ratio at the area of --size")
    add("--frames", type=int, default=81, help="4n + 1, at 16 a second; default %(default)s")
    add("--steps", type=int, default=4, help="1 to 4 as distilled, up to 100; default %(default)s")
    add("--seed", type=int, default=0)
    add("--sigma-max", type=float, help="default 80 for text-to-video, 200 for image-to-video")
    attention = command.add_mutually_exclusive_group()
    attention.add_argument("--topk", type=float, help="key blocks kept; default 0.1 where trained so, else dense")
    attention.add_argument("--dense", action="store_true", help="dense self-attention")
    add("--precision", choices=PRECISIONS, default="bf16", help="of sparse attention; default %(default)s")
    add("--ode", action="store_true", help="deterministic steps: sharper, less robust")
    add("--boundary", type=float, default=0.9, help="sigma of the hand-over between experts; default %(default)s")
    add("--noise-device", default="cpu", help="cpu (default) gives the same video on every machine")
    add("--tiled", action="store_true", help="decode in tiles: less memory")
    lora = {"action": "append", "default": [], "metavar": "FILE[:STRENGTH]"}
    add("--lora", **lora, help="a LoRA for --dit; strength default 1; may be given again")
    add("--lora-low", **lora, help="the same for --dit-low")


def models_of(arguments) -> dict:
    """The arguments of pipeline.Pipeline that add_models asked for."""
    import torch

    names = "dit", "vae", "text_encoder", "dit_low", "tokenizer", "vae_fast", "device"
    dtype = arguments.dtype and getattr(torch, arguments.dtype)
    return {name: getattr(arguments, name) for name in names} | {"dtype": dtype}


def signer_of(arguments):
    """The pipeline.provenance.Signer that --sign asked for, or None."""
    from ..pipeline.provenance import Signer

    return Signer(*arguments.sign) if arguments.sign else None


def clip_of(arguments, prompt: str = "", image=None):
    """The pipeline.Clip that add_settings asked for."""
    from ..pipeline import Clip
    from ..pipeline.sizes import parse_size

    names = (
        "seed", "adaptive", "frames", "steps", "sigma_max", "precision", "ode", "boundary", "noise_device", "tiled",
        "lora", "lora_low",
    )  # fmt: skip
    topk = None if arguments.dense else "auto" if arguments.topk is None else arguments.topk
    settings = {name: getattr(arguments, name) for name in names}
    return Clip(prompt, image=image, size=parse_size(arguments.size), topk=topk, **settings)


def run_generate(arguments) -> None:
    in_team(arguments, lambda team: _generate(arguments, team))


def _generate(arguments, team) -> None:
    from ..devices import pick_device
    from ..files import check_apart
    from ..heap import keep_freed_memory
    from ..pipeline import Pipeline
    from ..pipeline.video import check_place, check_sheet_path, check_video_path, write_contact_sheet, write_video
    from .console import progress_bars

    keep_freed_memory(pick_device(arguments.device))
    gc.freeze()  # what the imports made stays: the collections after each network need not look through it
    if not arguments.prompt.strip():
        raise TurboError("--prompt is empty. Expected a text that says what the video shows.")
    clip = clip_of(arguments, arguments.prompt, arguments.image)
    if team.first:
        check_video_path(arguments.output)
        if arguments.contact_sheet:
            check_sheet_path(arguments.contact_sheet)
        if arguments.json:
            check_place(arguments.json)
            if arguments.json.suffix.lower() != ".json":
                raise TurboError(f"--json {arguments.json} does not end in .json. Name it {arguments.json.stem}.json.")
        read = "dit", "dit_low", "vae", "vae_fast", "text_encoder", "tokenizer", "image"
        read = [*(getattr(arguments, name) for name in read), *(arguments.sign or ())]
        check_apart([arguments.output, arguments.contact_sheet, arguments.json], read)
        tell_of_steps([clip])
    signer = signer_of(arguments)
    if signer:
        signer.check(arguments.output)

    def write(clip, result):
        made = None if arguments.no_metadata else result.settings
        write_video(arguments.output, result.frames, made=made, finish=signer and signer.sign)
        if arguments.contact_sheet:
            write_contact_sheet(arguments.contact_sheet, result.frames)

    start = time.perf_counter()
    with (
        progress_bars() if team.first else contextlib.nullcontext() as progress,
        Pipeline(**models_of(arguments), memory=0, cache=arguments.cache, progress=progress, team=team) as pipe,
    ):
        if team.first:
            for line in told_of_world(pipe.model, clip):
                print(line, file=sys.stderr)
        [result] = pipe.map([clip], write)
    if team.first:
        _report(arguments, result, time.perf_counter() - start)


def tell_of_steps(clips) -> None:
    """Say once that there are more steps than models are distilled for."""
    from ..schedule import untrained

    said = untrained(max((clip.steps for clip in clips), default=0))
    if said:
        print(f"warning: {said}", file=sys.stderr)


def told_of_world(model, clip) -> list[str]:
    """What to say where TinyWan is asked for more than it has ever seen."""
    from ..checkpoint import WORLD
    from ..tinywan import world

    if model.metadata.get(WORLD) != world.WORLD:
        return []
    return [*filter(None, (world.told(clip.prompt), world.told_of_size(*clip.size, clip.frames)))]


def _report(arguments, result, total: float) -> None:
    from ..files import human_bytes, write_whole
    from .console import table

    rows = [(name, str(value)) for name, value in result.settings.items() if value is not None]
    if "topk" in result.settings and result.settings["topk"] is None:
        rows.append(("attention", "dense"))
    rows += [(f"time: {stage}", f"{seconds:.2f} s") for stage, seconds in result.seconds.items()]
    rows.append(("time: each step", ", ".join(f"{seconds:.2f}" for seconds in result.step_seconds) + " s"))
    rows.append(("time: total", f"{total:.2f} s"))
    rows += [(f"peak memory: {where}", human_bytes(size)) for where, size in result.peak_memory.items()]
    table(str(arguments.output), rows)
    if arguments.json:
        report = {
            "output": str(arguments.output),
            "settings": result.settings,
            "seconds": result.seconds,
            "step_seconds": result.step_seconds,
            "total_seconds": total,
            "peak_memory": result.peak_memory,
        }
        write_whole(arguments.json, json.dumps(report, indent=2) + "\n", "Check the folder and its rights.")
