"""Two writers on one target, kills at random moments of a conversion, and a disk that is full."""

import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.hostile import honest
from turbo_core import checkpoint

ROOT = Path(__file__).resolve().parents[2]
# converts when a line comes: what starting Python takes is not part of the race
_CONVERT = """
import sys
import torch
torch.set_num_threads(1)
from turbo_core import checkpoint
from turbo_core.errors import TurboError
checkpoint.inspect(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    source, target, format = line.rstrip("\\n").split("\\t")
    try:
        checkpoint.convert(source, target, format)
        print("done", flush=True)
    except TurboError as error:
        print(str(error), flush=True)
"""


class Writer:
    """A process that converts what it is told to."""

    def __init__(self, source: Path):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CONVERT, str(source)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def begin(self, source, target, format):
        self.process.stdin.write(f"{source}\t{target}\t{format}\n")
        self.process.stdin.flush()

    def result(self) -> str:
        return self.process.stdout.readline().strip()

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def _sources(folder: Path) -> list[Path]:
    """Two models whose conversions can be told apart."""
    paths = [folder / f"{seed}.pth" for seed in range(2)]
    for seed, path in enumerate(paths):
        path.write_bytes(honest.pth(honest.model(seed)))
    return paths


def _left(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith((".part", "-lock"))]


def race(rounds: int) -> dict:
    """Two conversions to one name at a time: the target is always the whole output of one of them."""
    row = {"tried": rounds, "bad": 0, "both wrote": 0, "one was told": 0}
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        sources, target = _sources(folder), folder / "out.safetensors"
        whole = []
        for source in sources:
            checkpoint.convert(source, target, "int8_block")
            whole.append(target.read_bytes())
        writers = [Writer(source) for source in sources]
        try:
            for _ in range(rounds):
                target.unlink(missing_ok=True)
                for writer, source in zip(writers, sources):
                    writer.begin(source, target, "int8_block")
                said = [writer.result() for writer in writers]
                told = [words for words in said if "is being written by process" in words]
                row["one was told"] += len(told) == 1
                row["both wrote"] += said.count("done") == 2
                right = said.count("done") + len(told) == 2 and "done" in said and target.read_bytes() in whole
                row["bad"] += not right or bool(_left(folder))
        finally:
            for writer in writers:
                writer.close()
    return row


def kills(rounds: int, seed: int = 0) -> dict:
    """SIGKILL at a random moment of a conversion: the target is the old file or the new one, and the next command in
    that folder leaves nothing else."""
    row, draw = {"tried": rounds, "bad": 0, "old file": 0, "new file": 0, "left a part": 0}, random.Random(seed)
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        sources, target, other = _sources(folder), folder / "out.safetensors", folder / "other.safetensors"
        checkpoint.convert(sources[1], target, "int8_block")
        new = target.read_bytes()
        began = time.perf_counter()
        checkpoint.convert(sources[0], target, "int8_block")
        spent, old = time.perf_counter() - began, target.read_bytes()
        for _ in range(rounds):
            target.write_bytes(old)
            writer = Writer(sources[1])
            writer.begin(sources[1], target, "int8_block")
            time.sleep(draw.uniform(0, 2.5 * spent))
            writer.close()
            row["left a part"] += any(name.endswith(".part") for name in _left(folder))
            content = target.read_bytes()
            row["old file"] += content == old
            row["new file"] += content == new
            checkpoint.convert(sources[0], other, "bf16")
            row["bad"] += content not in (old, new) or bool(_left(folder)) or target.read_bytes() != content
    return row


def full(rounds: int, seed: int = 0) -> dict:
    """A disk on which a file of the output's size has no room, at any byte of it: an error, the old file, no part."""
    row, draw = {"tried": rounds, "bad": 0}, random.Random(seed)
    with tempfile.TemporaryDirectory() as top:
        folder = Path(top)
        sources, target = _sources(folder), folder / "out.safetensors"
        checkpoint.convert(sources[0], target, "int8_block")
        old = target.read_bytes()
        writer = Writer(sources[1])
        try:
            for _ in range(rounds):
                _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.prlimit(writer.process.pid, resource.RLIMIT_FSIZE, (draw.randrange(1, len(old)), most))
                writer.begin(sources[1], target, "int8_block")
                said = writer.result()
                clear = "could not be written" in said and said.isprintable() and target.name in said
                row["bad"] += not clear or target.read_bytes() != old or bool(_left(folder))
        finally:
            writer.close()
    return row


def all_of(rounds: int) -> dict[str, dict]:
    return {
        "two writers, one target": race(rounds),
        "killed while converting": kills(rounds),
        "a full disk": full(rounds),
    }


def table(rows: dict[str, dict]) -> str:
    """The counts as Markdown."""
    lines = ["| | tried | bad | of these |", "|---|---:|---:|---|"]
    for name, row in rows.items():
        more = ", ".join(f"{what}: {count}" for what, count in row.items() if what not in ("tried", "bad"))
        lines.append(f"| {name} | {row['tried']} | {row['bad']} | {more} |")
    return "\n".join(lines)
