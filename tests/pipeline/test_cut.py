"""Files that are cut short while a video is made: an error that names one, or the same video, and never a dead process.

Each case is a process of its own, as a mapped page that is gone ends it with SIGBUS.
"""

import os
import shutil
import subprocess
import sys

import pytest

PROGRAM = """
import hashlib, os, sys
from pathlib import Path
from turbo_core import disk, pipeline
from turbo_core.errors import TurboError

folder, when = Path(sys.argv[1]), sys.argv[2]
files = [folder / name for name in ("dit.pth", "vae.pth", "text.safetensors")]
if when.endswith("mapped"):  # no memory is free
    disk.available_memory = lambda: (0, 1 << 40)

def progress(stage, done, total):
    if f"{stage} {done}" == when.removesuffix(" mapped"):
        for file in files:
            os.truncate(file, 5000)

try:
    made = pipeline.generate("a red circle", *files, steps=2, frames=5, size=(32, 32), progress=progress, device="cpu")
    print("made", hashlib.sha256(made.frames.numpy().tobytes()).hexdigest())
except TurboError as error:
    print(error)
"""
FILES = {
    "dit.pth": "TinyWan2.1-T2V-quant.pth",
    "vae.pth": "TinyWan2.1_VAE.pth",
    "text.safetensors": "tiny_umt5.safetensors",
}


def run(tiny, folder, when):
    for name, source in FILES.items():
        shutil.copy(tiny / source, folder / name)
    done = subprocess.run([sys.executable, "-c", PROGRAM, folder, when], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout.strip()


@pytest.mark.skipif(os.name == "nt", reason="Windows does not let a mapped file be cut")
@pytest.mark.parametrize(
    ("when", "named"),
    [
        ("text encoder 0", "text.safetensors"),
        ("load DiT 0", "dit.pth"),
        ("sampling 1 mapped", "dit.pth"),  # it is looked at before each evaluation
    ],
)
def test_a_file_that_is_cut_is_an_error_that_names_it(tiny, tmp_path, when, named):
    words = run(tiny, tmp_path, when)
    assert str(tmp_path / named) in words
    assert "\n" not in words and len(words) < 400


@pytest.mark.skipif(os.name == "nt", reason="Windows does not let a mapped file be cut")
def test_what_was_read_is_not_read_again(tiny, tmp_path):
    whole = run(tiny, tmp_path, "never")
    assert whole.startswith("made ") and run(tiny, tmp_path, "load DiT 1") == whole
