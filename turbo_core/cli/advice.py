"""The verbs of turbo-core that advise: plan, what a video needs, and doctor, what this machine can run."""

import json
import math
from pathlib import Path

from ..errors import TurboError
from .files import FORMATS
from .generate import PRECISIONS


def add_verbs(verbs, common) -> None:
    """Add these verbs to the parser's; common: the parent parser with what all verbs take."""
    command = verbs.add_parser("plan", parents=[common], help="what a video needs on cards of 8 to 32 GiB")
    add = command.add_argument
    add("dit", type=Path, nargs="?", metavar="DIT", help="a checkpoint; without it --model")
    add("--model", choices=("t2v-1.3b", "t2v-14b", "i2v-a14b"), default="t2v-14b", help="default %(default)s")
    add("--experts", type=int, choices=(1, 2), help="files that take turns; default 2 for A14B image-to-video, else 1")
    add("--size", default="832x480", help="WIDTHxHEIGHT, 480p, 720p-9:16 ...; default %(default)s")
    add("--frames", type=int, default=81, help="4n + 1; default %(default)s")
    add("--memory", type=float, metavar="GIB", help="of the card; default 8, 12, 16, 24 and 32")
    add("--format", choices=FORMATS, help="of the weights; default the file's, or int8_block")
    attention = command.add_mutually_exclusive_group()
    attention.add_argument("--topk", type=float, help="key blocks kept; default 0.1 where trained so, else dense")
    attention.add_argument("--dense", action="store_true", help="dense self-attention")
    add("--precision", choices=PRECISIONS, default="bf16", help="of sparse attention; default %(default)s")
    command.set_defaults(run=run_plan)

    command = verbs.add_parser("doctor", parents=[common], help="what this machine can run, and why not")
    command.add_argument("--json", action="store_true", help="for machines")
    command.set_defaults(run=run_doctor)


def run_plan(arguments) -> None:
    from .. import checkpoint
    from ..checkpoint import formats
    from ..pipeline import plan
    from ..pipeline.sizes import latent_shape, parse_size
    from .console import table

    model, format = plan.PUBLISHED[arguments.model], arguments.format or "int8_block"
    if arguments.dit:
        named = [name for name in plan.PUBLISHED if len(arguments.dit.name) > 2 and arguments.dit.name.lower() in name]
        if named and not arguments.dit.exists():
            raise TurboError(f"There is no file {arguments.dit}. For a published model: --model {' or '.join(named)}.")
        found = checkpoint.inspect(arguments.dit)
        stored = found.format if found.format in formats.FORMATS else "bf16"
        model, format = plan.model_of(found), arguments.format or stored
    if arguments.experts:
        model = model._replace(experts=arguments.experts)
    trained = 0.1 if model.has_sla and not arguments.dense else None
    topk = trained if arguments.topk is None else arguments.topk
    width, height = parse_size(arguments.size)
    frames, gib = arguments.frames, plan.GIB
    if arguments.memory is not None and not 0 < arguments.memory < math.inf:
        raise TurboError(f"--memory is the GiB of a card, got {arguments.memory:g}.")
    for memory in plan.CARDS if arguments.memory is None else [arguments.memory]:
        stages = plan.stages(model, width, height, frames, memory, format, topk, arguments.precision)
        rows = [
            (stage.name, f"{stage.weights / gib:.1f} + {stage.activations / gib:.1f} GiB", stage.verdict)
            for stage in stages
        ]
        table(f"{memory:g} GiB: {width}x{height}, {frames} frames, {format}", rows)
    tokens = math.prod(latent_shape(width, height, frames)) // 4
    linears = format if format in formats.INTEGERS else "float"
    total, moment, living = plan.step_peak(model, tokens, linears, topk, arguments.precision)
    kept = plan.kept_text_bytes(model)
    living, total = living | {"keys and values of the text, of all blocks": kept}, total + kept
    rows = [(name, f"{size / gib:.2f} GiB") for name, size in living.items()]
    table(f"Sampling beside the weights, {tokens} tokens, {moment}: {total / gib:.2f} GiB", rows)
    print(
        "Weights + activations, computed from shapes: a forecast, not a measurement. ComfyUI takes about as much at "
        "most, and offloads by itself; turbo-core generate does not offload."
    )


def run_doctor(arguments) -> None:
    from ..diagnostics.doctor import examine
    from .console import table

    findings = examine()
    if arguments.json:
        print(json.dumps(findings, indent=2))
        return
    for section, rows in findings.items():
        table(section, rows)
