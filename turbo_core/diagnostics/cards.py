"""What a card can make: files, settings, memory by the planner and seconds by the forecast. Nothing of it is measured.

One source for Turbo Doctor, turbo-core doctor, README and the note of the start workflow.
"""

from typing import NamedTuple

import torch

from ..pipeline.plan import CARDS, GIB, PUBLISHED, RESERVED, Stage, stages
from .steps import SECONDS

VIDEOS = (
    ("T2V 1.3B", "t2v-1.3b", 832, 480),
    ("T2V 14B", "t2v-14b", 832, 480),
    ("T2V 14B", "t2v-14b", 1280, 720),
    ("I2V A14B", "i2v-a14b", 832, 480),
    ("I2V A14B", "i2v-a14b", 1280, 720),
)
FRAMES, STEPS = 81, 4
TOPK, PRECISION = 0.15, "int8"  # what the node takes for top-k 0 and precision auto where kernels compute
OF_MEMORY = dict(zip(CARDS, ("RTX 4060", "RTX 4070", "RTX 4080", "RTX 4090", "RTX 5090")))  # GiB: whose seconds
FETCHED = 10e9  # bytes a second that come from main memory while the card computes: an assumption
_HOST_DECODES = 14_000  # bytes a pixel of a frame that ComfyUI's own VAE Decode asks for, in bf16


_SAID = {
    "all": "all weights stay on the card",
    "both experts": "both experts stay on the card",
    "one expert": "one expert is on the card, the other waits in main memory",
    "does not fit": "does not fit: make fewer frames",
}


class Fit(NamedTuple):
    """A kind of video on a card: the sampling of its plan, and seconds of all steps where the card is forecast."""

    file: str
    size: str
    sampling: Stage
    stays: str  # what of the weights is on the card while it samples, in a word or two
    seconds: float | None


def fits(memory: float, card: str | None = None) -> list[Fit]:
    """VIDEOS on a card of `memory` GiB, by the quantized files. card: a name in steps.SECONDS, or None."""
    found = []
    for file, kind, width, height in VIDEOS:
        model, size = PUBLISHED[kind], f"{width}x{height}"
        planned = stages(model, width, height, FRAMES, memory, topk=TOPK, precision=PRECISION)
        stage = next(s for s in planned if s.name == "sampling")
        one = stage.weights / model.experts
        if stage.fits == "resident":
            stays = "all" if model.experts == 1 else "both experts" if stage.kept == stage.weights else "one expert"
        else:
            stays = f"{stage.kept / GIB:.1f} GiB" if stage.kept else "does not fit"
        step = SECONDS.get((card, "t2v-14b" if kind == "i2v-a14b" else kind, size))
        seconds = step and stage.kept and STEPS * max(step, (one - min(one, stage.kept)) / FETCHED)
        found.append(Fit(file, size, stage, stays, seconds or None))
    return found


def table() -> str:
    """fits() of each of CARDS in Markdown, with the seconds of the card in its head."""
    rows = [["file", "video", "weights + activations", *(f"{gib} GiB ({card})" for gib, card in OF_MEMORY.items())]]
    rows.append(["---"] * len(rows[0]))
    for same in zip(*(fits(gib, card) for gib, card in OF_MEMORY.items())):
        cells = [f"{fit.stays}, {_seconds(fit.seconds)}" for fit in same]
        rows.append([same[0].file, same[0].size, _needs(same[0].sampling), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def settings() -> str:
    """What to set on each of CARDS, in Markdown."""
    rows = [["card", "begin with", "text encoder", "decoding"], ["---"] * 4]
    rows += [[f"{gib} GiB", *advice(gib)] for gib in CARDS]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def advice(memory: float) -> tuple[str, str, str]:
    """(the largest video whose weights stay on a card of `memory` GiB, text encoder, decoding) in words."""
    whole = [f"{fit.file} at {fit.size}" for fit in fits(memory) if fit.sampling.fits == "resident"]
    begin = " or ".join(dict.fromkeys([whole[0], whole[-1]])) if whole else "TinyWan, or fewer frames than 81"
    text = next(s for s in stages(PUBLISHED["t2v-1.3b"], 832, 480, FRAMES, memory) if s.name == "text encoder")
    encoder = "fp8 or bf16" if text.fits == "resident" else "fp8; where it runs out, device cpu in Load CLIP"
    room = memory * GIB - RESERVED
    pieces = [size for size, pixels in (("480p", 832 * 480), ("720p", 1280 * 720)) if _HOST_DECODES * pixels <= room]
    otherwise = "VAE Decode (Tiled)" if memory > CARDS[0] else "VAE Decode (Tiled), tile_size 256"
    decode = {0: otherwise, 1: f"480p: VAE Decode; 720p: {otherwise}", 2: "VAE Decode"}[len(pieces)]
    return begin, encoder, decode


def here(device: torch.device) -> list[tuple[str, str]]:
    """[(item, finding)] of the card that a device is."""
    if device.type != "cuda":
        return [("none", "TinyWan runs without one; README says what the published files need on 8 to 32 GiB")]
    card = torch.cuda.get_device_properties(device)
    return on_card(card.name, card.total_memory / GIB)


def on_card(name: str, memory: float) -> list[tuple[str, str]]:
    """[(item, finding)] of a card with `memory` GiB, as torch names it."""
    if memory < 4:
        return [("forecast", f"{memory:.1f} GiB are too little for the published files: TinyWan runs here")]
    card = name.removeprefix("NVIDIA ").removeprefix("GeForce ")
    card = card if any(card == known for known, *_ in SECONDS) else None
    begin, encoder, decode = advice(memory)
    told = f"{STEPS} steps by a model of the kernels" if card else "no seconds are forecast for this card"
    rows = [("forecast", f"nothing here was measured; memory from shapes, {FRAMES} frames, files with -quant; {told}")]
    for fit in fits(memory, card):
        of_them = f"{fit.stays} of the weights stay on the card, the rest is fetched in turn"
        stays = _SAID.get(fit.stays, of_them)
        seconds = f"; {_seconds(fit.seconds)}" if fit.seconds else ""
        rows.append((f"{fit.file} {fit.size}", f"{_needs(fit.sampling)}: {stays}{seconds}"))
    return rows + [
        ("begin with", begin),
        ("text encoder", encoder),
        ("decoding", decode),
        ("attention", "top-k 0 and precision auto in Sparse Low-Bit Attention"),
    ]


def _needs(stage: Stage) -> str:
    return f"{stage.weights / GIB:.1f} + {stage.activations / GIB:.1f} GiB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
