"""turbo-core generate by several processes: the clip of one, and one line that names the process where one fails."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.helpers.ranks import needs_torchrun, run_ranks
from tests.helpers.tiny_dits import TINY, save_pickle, tiny_state_dict
from tests.helpers.tiny_family import make_tiny
from turbo_core.checkpoint import convert
from turbo_core.cli import main

pytestmark = [pytest.mark.slow, needs_torchrun]
FAILING = Path(__file__).with_name("failing.py")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The small family with 4 heads: with one a process, torch multiplies a CPU's matrices in another order."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny(folder)
    for seed, (name, channels) in enumerate({"T2V": 16, "high": 36, "low": 36}.items()):
        state = tiny_state_dict(seed, TINY._replace(head_dim=64, in_dim=channels))
        convert(save_pickle(state, folder / f"{name}.pth"), folder / f"{name}-quant.safetensors", "int8_block")
    Image.new("RGB", (48, 24), (200, 40, 90)).save(folder / "image.png")
    return folder


def command(tiny, output, *more, dit="T2V.pth"):
    files = (
        f"--dit {tiny / dit} --vae {tiny / 'tiny_wan_vae.safetensors'} --text-encoder {tiny / 'tiny_umt5.safetensors'}"
    )
    size = "--size 128x144 --frames 9"  # 216 tokens: a block of 128 and one of 88
    given = f"generate {files} {size} --steps 2 --device cpu --prompt cat --no-metadata"
    return [*given.split(), "-o", str(output), "--contact-sheet", str(output.with_suffix(".png")), *map(str, more)]


def pair(tiny):
    return "--dit-low", tiny / "low-quant.safetensors", "--image", tiny / "image.png", "--topk", 0.4


@pytest.mark.parametrize("kind", ["dense", "int8 attention", "two experts and an image"])
def test_the_clip_of_one_process(tiny, tmp_path, kind):
    more, dit = ("--dense",), "T2V.pth"
    if kind == "int8 attention":
        more, dit = ("--topk", 0.4, "--precision", "int8"), "T2V-quant.safetensors"
    elif kind != "dense":
        more, dit = (*pair(tiny), "--steps", 4), "high-quant.safetensors"
    one, two = tmp_path / "one.mp4", tmp_path / "two.mp4"
    assert main(command(tiny, one, *more, dit=dit)) == 0
    done = run_ranks(2, "-m", "turbo_core", *command(tiny, two, *more, "--parallel", "sequence", dit=dit))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("time: total") == 1, "only the first process speaks"
    assert one.with_suffix(".png").read_bytes() == two.with_suffix(".png").read_bytes()
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("kind", "count", "said"),
    [
        ("version", 2, r"The processes differ in version of turbo_core: process 1 of 2 \(\S+, pid \d+\) has 0\.0\.1"),
        ("file", 2, r"differ in the file \S+T2V\.pth: process 1 of 2 .* has 5 bytes, abc, the first one \d+ bytes"),
        ("error", 2, r"process 1 of 2 \(\S+, pid \d+\): Out of memory .* Use the -quant files"),
        ("killed", 2, r"process 1 of 2 \(\S+, pid \d+\) ended without a word: killed, or out of memory\?"),
        ("silent", 2, r"process 1 of 2 \(\S+, pid \d+\) gave no sign of life for 3 s"),
    ],
)
def test_one_line_names_the_process_that_fails(tiny, tmp_path, kind, count, said):
    done = run_ranks(count, FAILING, kind, *command(tiny, tmp_path / "a.mp4", "--parallel", "sequence"))
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("turbo-core:")]
    assert len(lines) == 1 and re.search(said, lines[0]), done.stderr[-3000:]
    assert list(tmp_path.iterdir()) == []


def test_heads_that_do_not_divide(tiny, tmp_path):
    done = run_ranks(3, "-m", "turbo_core", *command(tiny, tmp_path / "a.mp4", "--parallel", "sequence"))
    lines = [line for line in done.stderr.splitlines() if line.startswith("turbo-core:")]
    assert lines == ["turbo-core: 4 heads do not divide among 3 processes: start 2 or 4 (--nproc-per-node)."]


def test_processes_that_would_all_make_the_same_clip(tiny, tmp_path, monkeypatch, capsys):
    assert main(command(tiny, tmp_path / "a.mp4", "--parallel", "sequence")) == 2
    assert "start it with torchrun --nproc-per-node N" in capsys.readouterr().err
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    assert main(command(tiny, tmp_path / "a.mp4")) == 2
    assert "add --parallel sequence" in capsys.readouterr().err
    assert main(command(tiny, tmp_path / "a.mp4", "--parallel", "sequence", "--device", "cuda:1")) == 2
    assert "a device of its own: say cuda or cpu, got cuda:1" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_batch_made_together(tiny, tmp_path):
    """A job that does not fit is told, the others are made, and made once; one has a LoRA."""
    jobs, files = tmp_path / "jobs.csv", [tmp_path / "one", tmp_path / "two"]
    shapes = {"lora_A": (4, 256), "lora_B": (512, 4)}
    lora = {f"blocks.0.ffn.0.{part}.weight": torch.full(shape, 0.05) for part, shape in shapes.items()}
    save_file(lora, tmp_path / "lora.safetensors")
    lines = "prompt,image,lora\na red cat,,\na bird,{},\na blue dog,,lora.safetensors:0.5\n"
    jobs.write_text(lines.format(tiny / "image.png"), "utf-8")
    given = command(tiny, tmp_path / "unused.mp4", "--dense", "--no-cache")
    settings = given[1 : given.index("--prompt")] + ["--no-metadata", "--dense", "--no-cache"]
    assert main(["batch", str(jobs), "-o", str(files[0]), *settings]) == 1
    together = "batch", jobs, "-o", files[1], *settings, "--parallel", "sequence"
    done = run_ranks(2, "-m", "turbo_core", *together)
    assert f"{jobs}:3: " in done.stderr and "is a text-to-video model" in done.stderr, done.stderr[-3000:]
    videos = sorted(path.name for path in files[0].glob("*.mp4"))
    assert len(videos) == 2 and videos == sorted(path.name for path in files[1].glob("*.mp4"))
    assert all((files[0] / name).read_bytes() == (files[1] / name).read_bytes() for name in videos)
    done = run_ranks(2, "-m", "turbo_core", *together)
    assert "2 of 3 videos are there already." in done.stderr
