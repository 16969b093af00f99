"""Measures a batch: 100 prompts through turbo-core batch, beside single runs and diffusers' pipeline in a loop.

    OMP_NUM_THREADS=1 python -m tests.tools.measure_batch benchmarks/results/cpu

For a machine with two free cores; takes some minutes. TinyWan, 33 frames of 128 x 128, 4 steps, dense attention, which
diffusers has too. Memory is read when a video is done. The loop and the single runs make fewer videos, and the table
says how many. Videos of the batch are compared with those of single runs frame by frame.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch

from turbo_core.bench import machine
from turbo_core.tinywan import world

ROOT = Path(__file__).resolve().parents[2]
TINYWAN = ROOT / "models" / "tinywan"
MODELS = {
    "--dit": TINYWAN / "diffusion_models" / "TinyWan2.1-T2V.safetensors",
    "--vae": TINYWAN / "vae" / "TinyWan2.1_VAE.safetensors",
    "--text-encoder": TINYWAN / "text_encoders" / "TinyWan_umt5.safetensors",
}
SETTINGS = ["--size", "128x128", "--frames", "33", "--steps", "4", "--dense", "--device", "cpu"]
COUNT, ALONE, LOOP = 100, 10, 10
WARM = 10  # videos after which memory is to stay


def prompts(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    return [world.caption(scene, seed) for seed, scene in enumerate(world.random_scenes(count, generator))]


def command(*verb):
    models = [item for option in MODELS.items() for item in option]
    return [sys.executable, "-m", "turbo_core", *map(str, [*verb, *models, *SETTINGS])]


def batch(texts, folder) -> dict:
    """The batch in a process of its own: seconds by stage, resident bytes after each video."""
    listed = folder / "prompts.txt"
    listed.write_text("\n".join(texts))
    start, out, sizes, done = time.perf_counter(), folder / "out", [], []
    process = subprocess.Popen(command("batch", listed, "-o", out, "--no-cache"), cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        time.sleep(0.02)
        if (out / "batch.jsonl").exists():
            records = [json.loads(line) for line in (out / "batch.jsonl").read_text().split("\n")[:-1] if line.strip()]
            done = [record for record in records if record["state"] == "done"]
            if len(done) > len(sizes):
                sizes += [resident(process.pid)] * (len(done) - len(sizes))
    wall = time.perf_counter() - start
    assert process.returncode == 0
    records = [json.loads(line) for line in (out / "batch.jsonl").read_text().splitlines() if line.strip()]
    done = [record for record in records if record["state"] == "done"]
    stages = {}
    for record in done:
        for stage, seconds in record["seconds"].items():
            stages[stage] = stages.get(stage, 0.0) + seconds
    return {"wall": wall, "stages": stages, "resident": sizes, "names": [record["name"] for record in done]}


def resident(pid) -> int:
    with open(f"/proc/{pid}/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def alone(texts, folder) -> list[float]:
    """Seconds of generate, a process for each prompt."""
    seconds = []
    for number, text in enumerate(texts):
        start = time.perf_counter()
        more = "--prompt", text, "-o", folder / f"alone-{number}.mp4"
        subprocess.run(command("generate", *more), cwd=ROOT, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return seconds


def loop(texts, folder) -> dict:
    """Diffusers' pipeline with the same weights, loaded once, in a process of its own."""
    (folder / "loop.json").write_text(json.dumps(texts))
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", __spec__.name, "--loop", folder], cwd=ROOT, check=True, capture_output=True)
    return json.loads((folder / "looped.json").read_text()) | {"wall": time.perf_counter() - start}


@torch.inference_mode()
def looped(folder) -> None:
    from turbo_core.bench import rivals
    from turbo_core.pipeline.video import to_frames, write_video
    from turbo_core.schedule import rcm_sigmas

    seconds = []
    pipe = rivals.wan_pipeline(*MODELS.values(), torch.device("cpu"), torch.float32)
    for number, text in enumerate(json.loads((folder / "loop.json").read_text())):
        start, generator = time.perf_counter(), torch.Generator().manual_seed(0)

        def draw(generator=generator):
            return torch.randn((1, 16, 9, 16, 16), generator=generator)

        pipe.scheduler = rivals.Schedule(rcm_sigmas(4).tolist(), draw)
        latents = pipe(
            text, height=128, width=128, num_frames=33, num_inference_steps=4, guidance_scale=1.0,
            latents=draw() * pipe.scheduler.sigmas[0], output_type="latent",
        ).frames  # fmt: skip
        write_video(folder / f"loop-{number}.mp4", to_frames(rivals.decode(pipe.vae, latents)))
        seconds.append(time.perf_counter() - start)
    (folder / "looped.json").write_text(json.dumps({"seconds": seconds}))


def trend(values) -> tuple[float, float]:
    """(slope of a line through them, its standard error)."""
    x = np.arange(len(values)) - (len(values) - 1) / 2
    y = np.asarray(values, float)
    slope = (x @ y) / (x @ x)
    rest = y - y.mean() - slope * x
    return slope, float(np.sqrt(rest @ rest / (len(values) - 2) / (x @ x)))


def by_ray(texts, folder, actors: int) -> float:
    """Seconds of the batch on a Ray cluster of this machine. Nothing stays and nothing overlaps, so that each actor
    works on one core."""
    listed = folder / f"ray-{actors}.txt"
    listed.write_text("\n".join(texts))
    more = "batch", listed, "-o", folder / f"ray-{actors}", "--no-cache", "--ray", "--workers", actors, "--memory", 0
    start = time.perf_counter()
    subprocess.run(command(*more), cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def frames(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def main(target: Path) -> None:
    texts = prompts(COUNT)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        ours, singles, theirs = batch(texts, scratch), alone(texts[:ALONE], scratch), loop(texts[:LOOP], scratch)
        ray = {actors: by_ray(texts, scratch, actors) for actors in (2, 1)}
        by_prompt = {json.loads(p.read_text())["settings"]["prompt"]: p for p in (scratch / "out").glob("*.json")}
        same = [
            np.array_equal(frames(by_prompt[text].with_suffix(".mp4")), frames(scratch / f"alone-{number}.mp4"))
            for number, text in enumerate(texts[:ALONE])
        ]
    busy = sum(ours["stages"][stage] for stage in ("sampling", "decode", "write"))
    two = ours["stages"]["sampling"] + ours["stages"]["decode"]
    after = ours["resident"][WARM:]
    slope, error = trend(after)
    report = {
        "what": __doc__.splitlines()[0],
        "machine": machine.facts(torch.device("cpu")),
        "batch": {name: ours[name] for name in ("wall", "stages", "resident")} | {"videos": COUNT},
        "stages but sampling, decoding and writing": sum(ours["stages"].values()) - busy,
        "wall over sampling + decoding": ours["wall"] / two,
        "growth from video 10 on": (max(after) - after[0]) / after[0],
        "bytes a video": slope,
        "standard error": error,
        "generate, seconds each": singles,
        "diffusers, seconds each": theirs["seconds"],
        "diffusers, all": theirs["wall"],
        "Ray, seconds by actors": ray,
        "same frames": f"{sum(same)} of {len(same)}",
    }
    target.mkdir(parents=True, exist_ok=True)
    (target / "batch.json").write_text(json.dumps(report, indent=1) + "\n")
    (target / "batch.md").write_text(table(report))
    print(table(report))


def table(report) -> str:
    ours, stages = report["batch"], report["batch"]["stages"]
    single = sum(report["generate, seconds each"]) / len(report["generate, seconds each"])
    theirs = sum(report["diffusers, seconds each"]) / len(report["diffusers, seconds each"])
    each = ours["wall"] / ours["videos"]
    ray = report["Ray, seconds by actors"]
    rest = report["stages but sampling, decoding and writing"]
    size, error = ours["resident"], report["standard error"] / 1e3
    rows = [
        ("batch, a video", f"{each:.2f} s", f"{ours['videos']} videos in {ours['wall']:.0f} s, start and all"),
        ("generate, a video", f"{single:.2f} s", f"{single / each:.1f} x the batch; mean of {ALONE} processes"),
        ("diffusers in a loop, a video", f"{theirs:.2f} s", f"{theirs / each:.1f} x; mean of {LOOP}, loading left out"),
        ("loading and text in all", f"{rest:.2f} s", f"{rest / ours['wall']:.1%} of the batch's time"),
        ("sampling + decoding", f"{stages['sampling'] + stages['decode']:.0f} s", "side by side, of all videos"),
        ("wall over their sum", f"{report['wall over sampling + decoding']:.2f}", "asked: at most 1.0"),
        (
            "memory after video 10",
            f"{size[WARM] / 1e6:.0f} MB",
            f"{report['growth from video 10 on']:+.2%} at most after",
        ),
        ("memory a video", f"{report['bytes a video'] / 1e3:+.1f} kB", f"slope; standard error {error:.1f} kB"),
        ("Ray, two actors", f"{ray[1] / ray[2]:.2f} x one", f"{ray[2]:.0f} and {ray[1]:.0f} s, Ray's start and all"),
        ("frames equal to single runs", report["same frames"], ""),
    ]
    lines = [f"# A batch of {COUNT} videos, measured", "", __doc__.split("\n\n")[2].strip(), ""]
    lines += ["| | | |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows), ""]
    lines += [f"{key}: {value}" for key, value in report["machine"].items() if isinstance(value, str)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1] == "--loop":
        looped(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
