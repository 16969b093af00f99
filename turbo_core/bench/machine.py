"""What a benchmark runs on: its name, its versions, its own rates, and what the card says of its clocks meanwhile."""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import statistics
import subprocess
import threading

import torch

from .. import __version__
from ..devices import has_int_mm
from .harness import Case, Contender, exact, relative_error

LIBRARIES = ("triton", "triton-windows", "comfy-kitchen", "torchao", "sageattention", "numpy")
QUERY = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
COPY, MATMUL = "copy", "matrix product"
UNITS = ("SM MHz", "memory MHz", "W", "C")


def slug(device) -> str:
    """Folder name of a machine's results: "cpu", "mps", or the card's name ("h200", "geforce-rtx-4090")."""
    device = torch.device(device)
    if device.type != "cuda":
        return device.type
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return name.removeprefix("nvidia-")


def facts(device) -> dict:
    """What is known of this machine and its software. Reads the machine, changes nothing."""
    device = torch.device(device)
    found = {
        "device": device.type,
        "name": _cpu_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": _versions(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "load": _load(),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "name": card.name,
            "memory_gib": round(card.total_memory / 2**30, 1),
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "driver": _driver(device),
            "runtime": f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
        }
    return found


def _versions():
    versions = {"turbo-core": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _cpu_name():
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _load():
    """Processes that wanted a core in the last minute, on average; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def busy(facts: dict) -> str | None:
    """A sentence where other work ran beside the measurement, judged before it began."""
    load, cores = facts.get("load"), facts.get("cores")
    if load is None or not cores or load <= 0.25 * cores:
        return None
    return f"busy machine: {load:.1f} processes wanted its {cores} cores as it began"


def _smi(device, fields, *more):
    """The command that asks nvidia-smi about one card, or None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None or torch.version.hip:
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    card = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    return [program, "-i", card, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", *more]


def _driver(device):
    command = _smi(device, ["driver_version"])
    if command is None:
        return "not told: no nvidia-smi"
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not told: {type(error).__name__}"
    return said.stdout.strip() or "not told"


@contextlib.contextmanager
def watch(device):
    """A dict that holds, at the end, what nvidia-smi said five times a second of clocks, power and temperature."""
    found = {}
    if torch.device(device).type != "cuda":
        yield found
        return
    command = _smi(device, QUERY, "-lms", "200")
    if command is None:
        found["not logged"] = "no nvidia-smi"
        yield found
        return
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
    reader.start()
    try:
        yield found
    finally:
        process.terminate()
        process.wait()
        reader.join(5)
        found |= read_clocks(lines)


def read_clocks(lines) -> dict:
    """{quantity: [least, median, largest]} of nvidia-smi's lines; what it does not know ("[N/A]") is left out."""
    found = {}
    samples = [line.split(",") for line in lines if line.count(",") == len(QUERY) - 1]
    for name, column in zip(UNITS, zip(*samples)):
        values = []
        for cell in column:
            with contextlib.suppress(ValueError):
                values.append(float(cell))
        if values:
            found[name] = [min(values), statistics.median(values), max(values)]
    return found or {"not logged": "nvidia-smi said nothing"}


def limits_case(device, quick=False) -> Case:
    """The machine's own copy and matrix product, as contenders of a case: every other figure is held against them."""
    device = torch.device(device)
    card = device.type == "cuda"
    size = 2**25 if quick else 2**30 if card else 2**28
    n = 512 if quick else 8192 if card else 2048
    dtype = torch.bfloat16 if device.type != "cpu" else torch.float32

    def copy():
        source = torch.ones(size, dtype=torch.int8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def product():
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return lambda: (a @ b, a, b)

    def int8_product():
        a, b = (torch.randint(-128, 128, (n, n), dtype=torch.int8, device=device) for _ in range(2))
        return lambda: (torch._int_mm(a, b.t()), a, b.t())

    def product_error(result):
        y, a, b = result
        rows = slice(0, 64)
        return relative_error(y[rows], exact(a[rows]) @ exact(b))

    contenders = [
        Contender(COPY, copy, lambda y: 0.0 if bool((y[:: 1 << 12] == 1).all()) else 1.0, 0.0),
        Contender(f"{str(dtype).removeprefix('torch.')} {MATMUL}", product, product_error, 1e-2),
    ]
    if has_int_mm(device):
        contenders.append(Contender(f"int8 {MATMUL}", int8_product, product_error, 0.0))
    return Case(
        f"machine: copy of {size >> 20} MiB, products of {n} x {n} x {n}",
        {"bytes": 2 * size, "n": n},
        contenders,
        (contenders[1].name,),
    )


def limits(measured: dict) -> dict:
    """{"gb_s", "tflops", "int8_tops"} from the measured limits_case; the rates are added to its rows."""
    found = {}
    shape = measured["shape"]
    for row in measured["rows"]:
        if "ms" not in row:
            continue
        if row["name"] == COPY:
            found["gb_s"] = row["gb_s"] = float(f"{shape['bytes'] / row['ms'] / 1e6:.4g}")
        else:
            row["tflops"] = float(f"{2 * shape['n'] ** 3 / row['ms'] / 1e9:.4g}")
            found["int8_tops" if row["name"].startswith("int8") else "tflops"] = row["tflops"]
    return found
