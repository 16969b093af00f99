"""Prompt to file, whole processes: ours beside what else makes such a clip of the same weights.

Each clip is made in a process of its own, so that imports and peak memory are in its figures: A B C, then C B A. On one
thread of a CPU times are what the process computed, which other work on the machine does not change much.
"""

import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from .. import checkpoint
from ..diagnostics import charts
from ..errors import TurboError, shown
from ..files import human_bytes
from . import machine
from .harness import relative_error
from .one_clip import CPU_TIME, WALL
from .report import SCHEMA, describe, write

try:
    import resource
except ImportError:  # Windows
    resource = None

PROMPT = "A bright red circle rises towards the top over a plain navy backdrop. The camera does not move."
STAGES = ("start", "load", "text", "sampling", "decode", "write", "rest")
HEADER = ("way", "wall", "total", *STAGES, "a step", "peak memory", "x base", "differs by")
LONGEST = 1800  # seconds a clip may take


class Way(NamedTuple):
    """One way to a clip. maker: see one_clip.MAKERS. file: "turbo", "student" or "teacher". guidance None: rCM's few
    steps. format: what the file is quantized to first, outside the figures. twin: the way that computes the same."""

    name: str
    maker: str
    file: str
    steps: int
    guidance: float | None = None
    topk: float | None = None
    format: str | None = None
    twin: str | None = None


FAST, FEW, GUIDED = (
    "turbo-core, 4 steps, SLA 0.15, W8A8",
    "turbo-core, 4 steps",
    "turbo-core, teacher, 50 steps, diffusers' VAE",
)
WAYS = (
    Way("diffusers, teacher, 50 steps", "theirs", "teacher", 50, 3.0, twin=GUIDED),
    Way(GUIDED, "guided", "teacher", 50, 3.0),
    Way("diffusers, 4 steps", "theirs", "student", 4, twin=FEW),
    Way("turbo-core, 4 steps, ComfyUI's VAE", "hosted", "student", 4, twin=FEW),
    Way(FEW, "ours", "student", 4),
    Way(FAST, "ours", "turbo", 4, topk=0.15, format="int8_block"),
)


def run(files, device, out: Path, quick=False, prompt=PROMPT, tell=print, status=None) -> dict:
    """Make the clips, show and write clip.json, clip.md and clip.png to out/<machine>/; returns the report.

    files: {"turbo", "student", "teacher", "vae", "text": path}. quick: 5 frames, four steps for the teachers, once.
    """
    missing = next((path for path in files.values() if not Path(path).is_file()), None)
    if missing:
        raise TurboError(f"bench clip: there is no {missing}. Run it in a clone of the repository, which has TinyWan.")
    device = torch.device(device)
    facts, folder = machine.facts(device), out / machine.slug(device)
    alone = device.type == "cpu" and torch.get_num_threads() == 1 and resource is not None
    clock = CPU_TIME if alone else WALL
    settings = {"prompt": prompt, "width": 128, "height": 128, "frames": 5 if quick else 33, "seed": 0}
    runs = {way.name: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as aside:
        places = _weights(files, Path(aside))
        kept = {way: Path(aside) / f"{i}.pt" for i, way in enumerate(WAYS)}

        def job(way, **other):
            steps = min(way.steps, 4) if quick else way.steps
            return settings | {
                "maker": way.maker, "steps": steps, "guidance": way.guidance, "topk": way.topk, "dit": places[way],
                "vae": str(files["vae"]), "text": str(files["text"]), "device": str(device),
                "threads": torch.get_num_threads(), "clock": clock, "output": f"{aside}/clip.mp4",
                "kept": str(kept[way]),
            } | other  # fmt: skip

        if not quick:  # what comes from the disk, or is compiled, for the first time is nobody's time
            for way in {way.maker: way for way in reversed(WAYS)}.values():
                _child(job(way, frames=5, steps=1, kept=f"{aside}/first.pt"))
        for way in [*WAYS, *([] if quick else reversed(WAYS))]:
            if status:
                status(f"{way.name}: run {len(runs[way.name]) + 1}")
            runs[way.name].append(_child(job(way)))
        if status:
            status("")
        rows = [_row(way, runs[way.name], kept) for way in WAYS]
    base = next((row["total"] for row in rows if "total" in row), None)
    for row in rows:
        if "total" in row:
            row["speedup"] = round(base / row["total"], 2)
    report = {
        "schema": SCHEMA, "group": "clip", "machine": facts, "settings": settings | {"quick": quick, "clock": clock},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "notes": [note for note in (machine.busy(facts), quick and "quick: the teachers take 4 steps") if note],
        "rows": rows,
    }  # fmt: skip
    text = markdown(report)
    tell(text)
    picture = _picture(report) if charts.available() else None
    for name, content in {
        "json": json.dumps(report, indent=1).encode() + b"\n",
        "md": text.encode(),
        "png": picture,
    }.items():
        if content:
            write(folder / f"clip.{name}", content)
            tell(str(folder / f"clip.{name}"))
    return report


def _weights(files, aside: Path) -> dict:
    """{way: path} of the weights, quantized where a way says so."""
    places = {}
    for way in WAYS:
        places[way] = str(files[way.file])
        if way.format is not None:
            target = aside / f"{way.file}-{way.format}.safetensors"
            places[way] = str(checkpoint.quantize(files[way.file], target, way.format).path)
    return places


def _child(job) -> dict:
    """What a process of its own says of the clip that it made; its whole time is "total" by the job's clock, and "wall"
    by that on the wall."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"])}
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, os.environ.get("COMFYUI_DIR"), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", f"{__package__}.one_clip"]
    begun, start, spent = time.time(), time.perf_counter(), _computed()
    try:
        done = subprocess.run(
            command, input=json.dumps(job | {"spawned": begun}), capture_output=True, text=True, env=environment,
            timeout=LONGEST,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {LONGEST} s"}
    wall = time.perf_counter() - start
    total = _computed() - spent if job["clock"] == CPU_TIME else wall
    if done.returncode:
        return {"failed": shown((done.stderr.strip().splitlines() or ["no message"])[-1], 200)}
    found = json.loads(done.stdout.splitlines()[-1])
    if "seconds" in found:
        found["seconds"]["rest"] = total - sum(found["seconds"].values())
    return found | {"total": total, "wall": wall}


def _computed() -> float:
    """Seconds that processors have worked for child processes that are over."""
    used = resource and resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime if used else 0.0


def _row(way: Way, runs: list[dict], kept: dict) -> dict:
    """Medians of the runs of a way, and how far its latents are from its twin's."""
    row = {"name": way.name, **way._asdict(), "runs": runs}
    for reason in ("missing", "failed"):
        if any(reason in one for one in runs):
            return row | {"status": reason, "reason": next(one[reason] for one in runs if reason in one)}
    row |= {"status": "ok"} | {name: statistics.median(one[name] for one in runs) for name in ("wall", "total")}
    row["seconds"] = {stage: statistics.median(one["seconds"][stage] for one in runs) for stage in STAGES}
    row["step"] = statistics.median(step for one in runs for step in one["steps"])
    row["peak"] = {name: max(one["peak"][name] for one in runs) for name in runs[0]["peak"]}
    row["same_bits"] = len({one["digest"] for one in runs}) == 1
    twin = next((place for other, place in kept.items() if other.name == way.twin), None)
    if twin is not None and twin.is_file():
        got, want = (torch.load(place, weights_only=True) for place in (kept[way], twin))
        row["error"] = float(f"{relative_error(got, want):.3g}")
    return row


def cells(row: dict) -> tuple[str, ...]:
    """A timed row as text, in the order of HEADER."""
    seconds = [f"{row['seconds'][stage]:.2f}" for stage in STAGES]
    error = f"{row['error']:.0e}" if "error" in row else ""
    memory = ", ".join(human_bytes(size) for size in row["peak"].values())
    whole = f"{row['wall']:.2f}", f"{row['total']:.2f}"
    return row["name"], *whole, *seconds, f"{row['step']:.3f}", memory, f"{row['speedup']:.2f}", error


def markdown(report: dict) -> str:
    """The report as a page."""
    settings = report["settings"]
    size = f"{settings['width']}x{settings['height']}, {settings['frames']} frames, seed {settings['seed']}"
    lines = [
        f"# clip: {describe(report['machine'])}", "", *(f"{note}." for note in report["notes"]),
        f"TinyWan, {size}: \"{settings['prompt']}\"", "",
        f"Seconds, medians. wall: by the clock; all others: {settings['clock']}. total: the whole process; start: "
        "Python and imports before the first file is opened; load: VAE and transformer, with the libraries that they "
        "need; rest: checks, and what Python does to end.", "",
        "| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|",
    ]  # fmt: skip
    lines += ["| " + " | ".join(cells(row)) + " |" for row in report["rows"] if row["status"] == "ok"]
    for row in report["rows"]:
        if row["status"] != "ok":
            lines += ["", f"* {row['name']}: {row['status']}: {row['reason']}"]
        elif row["twin"] and "error" in row:
            lines += ["", f"* {row['name']}: its latents are held to those of {row['twin']}."]
        if not row.get("same_bits", True):
            lines += ["", f"* {row['name']}: its runs differ in their frames."]
    return "\n".join(lines) + "\n"


def _picture(report) -> bytes | None:
    rows = [row for row in report["rows"] if row["status"] == "ok"]
    if not rows:
        return None
    longest = max(row["total"] for row in rows)
    bars = []
    for row in rows:
        parts = ", ".join(f"{stage} {row['seconds'][stage]:.2f}" for stage in STAGES if stage != "write")
        colour = charts.OTHERS if row["maker"] == "theirs" else charts.OURS if row["maker"] == "ours" else charts.BASE
        bars.append(charts.Bar(row["name"], row["total"] / longest, f"{row['total']:.2f} s   {parts}", colour))
    lines = [
        describe(report["machine"]),
        "; ".join([f"whole processes, {report['settings']['clock']}", *report["notes"]]),
    ]
    return charts.png(
        charts.sheet("turbo-core bench clip", lines, [charts.bars("seconds from prompt to MP4", bars)]), colours=64
    )
