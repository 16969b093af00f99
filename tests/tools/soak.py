"""Many runs in one ComfyUI: `python -m tests.tools.soak [--runs 200]`.

One server, prompts of every kind in turn, conversions and wrong inputs between them, interrupts at random steps and
moments. Looked at: failures, resident memory of the server after each run, and whether each latent, frame and model is
bit for bit what a fresh process makes of the same prompt. The host's history, which keeps every prompt, is emptied.
Writes soak.json and soak.png to benchmarks/results/cpu and exits with 1 where something is not as it should be.
"""

import argparse
import collections
import hashlib
import json
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import comfyui as host
from tests.helpers.comfyui import PACK, find_comfyui
from tests.tools.soak_prompts import WRONG, prompt, put_wrong, schedule

RESULTS = PACK / "benchmarks" / "results" / "cpu"
WARM_UP = 39  # runs: every kind was there three times, every node of the host imported what it needs
GROWTH = 0.01
# Gives free pages in the heap back to the system, where glibc knows how: the weights of these models are so small that
# they lie there, and what is resident would tell of the gaps between them.
TRIM = """
import ctypes
from aiohttp import web
from server import PromptServer

@PromptServer.instance.routes.get("/soak/trim")
async def trim(request):
    return web.json_response(getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0))

NODE_CLASS_MAPPINGS = {}
"""


@dataclass
class Done:
    """A run: how it ended, the interrupt asked for, the steps it made, bytes resident after it, digests of its files,
    words that its error must hold, names that it left among the models"""

    job: str
    asked: int | float | None
    status: str
    steps: int
    rss: int
    digests: tuple
    error: str = ""
    wrong: str = ""
    left: tuple = ()


def put_trim(base):
    """Let a host in a folder `base` give free memory back when it is asked to."""
    (base / "custom_nodes").mkdir(exist_ok=True)
    (base / "custom_nodes" / "trim.py").write_text(TRIM)


def resident(server):
    """Bytes resident of a server, less what it can give back."""
    import psutil

    host.get(server, "/soak/trim")
    return psutil.Process(server.process.pid).memory_info().rss


def one(server, job, interrupt=None, number=0):
    """Send one prompt, interrupting it when step `interrupt` is done (0: when the sampler begins), or, where that is a
    float, so many seconds after it began."""
    stop = threading.Timer(interrupt if isinstance(interrupt, float) else 0, host.post, (server, "/interrupt", {}))

    def react(message):
        data = message["data"]
        if message["type"] == "execution_start" and isinstance(interrupt, float):
            stop.start()
        begins = message["type"] == "executing" and data["node"] == "sample" and interrupt == 0
        if begins or (message["type"] == "progress" and data["node"] == "sample" and data["value"] == interrupt):
            host.post(server, "/interrupt", {})

    ran = host.run(server, prompt(job, f"run{number}"), react, patience=600)
    stop.cancel()
    if stop.ident is not None:  # or it would stop the next one
        stop.join()
    models = server.base / "models" / "diffusion_models"
    files = [*sorted((server.base / "output").glob(f"run{number}_*")), *models.glob(f"run{number}.*")]
    digests = digest(files) if ran.status == "execution_success" else ()
    for file in files:
        if ran.status == "execution_success" or file.parent != models:
            file.unlink()
    left = tuple(sorted(file.name for file in models.glob(f"*run{number}.*")))
    host.post(server, "/history", {"clear": True})
    rss = resident(server)
    error = ran.error if ran.status not in ("execution_success", "execution_interrupted") else ""
    steps = len(ran.progress("sample"))
    return Done(job.name(), interrupt, ran.status, steps, rss, digests, error, WRONG.get(job.kind, ""), left)


def digest(files):
    """(SHA-256 of the latent or model, SHA-256 of all frames). Of latents and frames over values alone: their files
    also hold the prompt."""
    from PIL import Image
    from safetensors.torch import load_file

    latent, frames = hashlib.sha256(), hashlib.sha256()
    for file in files:
        if file.suffix == ".safetensors":
            latent.update(file.read_bytes())
        elif file.suffix == ".latent":
            latent.update(load_file(file)["latent_tensor"].contiguous().numpy().tobytes())
        else:
            with Image.open(file) as image:
                frames.update(image.tobytes())
    return latent.hexdigest(), frames.hexdigest()


def soak(server, jobs, progress=None):
    """[Done] of the jobs, one after the other in one server."""
    runs = []
    for number, (job, interrupt) in enumerate(jobs):
        runs.append(one(server, job, interrupt, number))
        if progress is not None:
            progress(number, runs[-1])
    return runs


def complaints(runs):
    """What went wrong, in words: failures, wrong inputs that were taken or not explained, files left behind, outputs of
    one prompt that differ, of two prompts that do not."""
    found, seen = [], {}
    for number, run in enumerate(runs):
        wanted = {"execution_success"} if run.asked is None else {"execution_success", "execution_interrupted"}
        if run.wrong:
            wanted = {"execution_error", "refused"} if run.wrong in run.error else {f"an error with {run.wrong!r}"}
        if run.status not in wanted:
            found.append(f"run {number} ({run.job}) ended as {run.status}: {run.error}")
        elif run.left:
            found.append(f"run {number} ({run.job}) left {', '.join(run.left)}")
        elif run.digests and seen.setdefault(run.job, run.digests) != run.digests:
            found.append(f"run {number} ({run.job}) differs from an earlier run of the same prompt")
    makers = collections.defaultdict(list)
    for job, digests in seen.items():
        makers[digests].append(job)
    return found + [f"the same output from {' and from '.join(jobs)}" for jobs in makers.values() if len(jobs) > 1]


def growth(rss, warm_up):
    """(median of the first quarter after warm-up, median of the last, their growth, growth by the fitted line).

    The line is Theil's: the median slope over all pairs, which single peaks do not tilt. Growths are fractions.
    """
    rss = rss[warm_up:]
    quarter = max(1, len(rss) // 4)
    first, last = statistics.median(rss[:quarter]), statistics.median(rss[-quarter:])
    slopes = [(b - a) / (j - i) for i, a in enumerate(rss) for j, b in enumerate(rss[i + 1 :], i + 1)]
    return first, last, last / first - 1, statistics.median(slopes) * (len(rss) - 1) / first


def sampled(runs, jobs):
    """{run number: Job} to repeat in a fresh process: one of each kind, one that followed an interrupt if there is."""
    chosen = {}
    for number, (job, _) in enumerate(jobs):
        if runs[number].digests:
            followed = number > 0 and runs[number - 1].status == "execution_interrupted"
            chosen.setdefault((job.kind, job.lora), []).append((not followed, -number, job))
    return {-number: job for _, number, job in (min(found) for found in chosen.values())}


def against_fresh(comfyui, base, runs, chosen):
    """For each chosen run, whether a server that did nothing else gives the same latent and frames."""
    rows = []
    for number, job in sorted(chosen.items()):
        server = host.start(comfyui, base)
        try:
            fresh = one(server, job, number=number)
        finally:
            host.stop(server)
        followed = number > 0 and runs[number - 1].status == "execution_interrupted"
        equal = fresh.digests == runs[number].digests
        rows.append({"run": number, "prompt": job.name(), "after_interrupt": followed, "equal": equal})
    return rows


def report(runs, fresh, warm_up, seconds, system):
    """The results as they go to soak.json."""
    rss = [run.rss for run in runs]
    first, last, by_median, by_line = growth(rss, warm_up)
    asked = [run for run in runs if run.asked is not None]
    hit = [run for run in asked if run.status == "execution_interrupted"]
    repeated = collections.Counter(run.job for run in runs if run.digests)
    different = [f"run {row['run']} differs from a fresh process" for row in fresh if not row["equal"]]
    return {
        "comfyui": system["comfyui_version"],
        "torch": system["pytorch_version"],
        "threads": 1,
        "runs": len(runs),
        "seconds": round(seconds, 1),
        "warm_up": warm_up,
        "interrupts": {
            "asked": len(asked),
            "at_random_moments": sum(isinstance(run.asked, float) for run in asked),
            "stopped": len(hit),
            "by_steps_made": dict(sorted(collections.Counter(run.steps for run in hit).items())),
        },
        "measured_by_status": _by_status(runs[warm_up:]),
        "runs_by_kind": dict(collections.Counter(run.job.split(",")[0] for run in runs)),
        "prompts": len(repeated),
        "outputs_compared_within_the_host": sum(repeated.values()) - len(repeated),
        "fresh_process": fresh,
        "rss_mb": {
            "median_first_quarter": round(first / 1e6, 1),
            "median_last_quarter": round(last / 1e6, 1),
            "growth_percent_of_medians": round(100 * by_median, 3),
            "growth_percent_of_fitted_line": round(100 * by_line, 3),
            "after_each_run": [round(value / 1e6, 1) for value in rss],
        },
        "complaints": complaints(runs) + different,
    }


def _by_status(runs):
    """{"made", "refused", "failed" or "interrupted": how many}"""
    names = {"execution_success": "made", "execution_error": "failed", "execution_interrupted": "interrupted"}
    return dict(collections.Counter(names.get(run.status, run.status) for run in runs))


def main():
    parser = argparse.ArgumentParser(prog="soak", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the prompts and of the interrupts")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for soak.json and soak.png")
    args = parser.parse_args()
    comfyui = find_comfyui()
    if comfyui is None:
        sys.exit("No ComfyUI found: set COMFYUI_DIR to its folder (0.33 or newer).")
    from tests.helpers.tiny_family import make_tiny
    from tests.tools.soak_plot import plot

    jobs, warm_up = schedule(args.runs, args.seed), min(WARM_UP, args.runs // 3)
    with tempfile.TemporaryDirectory() as folder:
        make_tiny(Path(folder) / "tiny")
        base = host.make_base(Path(folder) / "base", Path(folder) / "tiny")
        put_wrong(base / "models")
        put_trim(base)
        server, begun = host.start(comfyui, base), time.monotonic()
        try:
            system = host.get_json(server, "/system_stats")["system"]
            runs = soak(server, jobs, say)
        finally:
            host.stop(server)
        seconds = time.monotonic() - begun
        fresh = against_fresh(comfyui, base, runs, sampled(runs, jobs))
    result = report(runs, fresh, warm_up, seconds, system)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "soak.json").write_text(json.dumps(result, indent=1) + "\n")
    interrupted = [number for number, run in enumerate(runs) if run.status == "execution_interrupted"]
    plot(args.out / "soak.png", [run.rss / 1e6 for run in runs], warm_up, interrupted)
    memory = result["rss_mb"]
    print(*(f"{name}: {value}" for name, value in memory.items() if name != "after_each_run"), sep="\n")
    print(*result["complaints"], sep="\n")
    return int(bool(result["complaints"]) or memory["growth_percent_of_medians"] > 100 * GROWTH)


def say(number, run):
    print(f"{number:4d} {run.rss / 1e6:8.1f} MB  {run.status.removeprefix('execution_')}  {run.job}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
