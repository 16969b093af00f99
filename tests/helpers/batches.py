"""A batch of the random family: its command line, and what its journal says."""

import json
from collections import Counter

PROMPTS = "a red circle\na blue square\nbad \x00 is fine\na red circle that moves\n"
FILES = "TinyWan2.1-T2V.pth", "TinyWan2.1_VAE.pth", "tiny_umt5.safetensors"


def command(tiny, list_of_jobs, output, *more):
    files = [
        item for pair in zip(("--dit", "--vae", "--text-encoder"), (tiny / name for name in FILES)) for item in pair
    ]
    settings = ["--size", "32x32", "--frames", "5", "--steps", "2", "--device", "cpu", "--no-cache"]
    return ["batch", *map(str, [list_of_jobs, "-o", output, *files, *settings, *more])]


def records(folder):
    return [json.loads(line) for line in (folder / "batch.jsonl").read_text().splitlines() if line.strip()]


def made(folder):
    """How often each video was made, by the manifest."""
    return Counter(record["name"] for record in records(folder) if record["state"] == "done")
