"""What this machine can run, which path each part takes, and why a faster one is not taken."""

import importlib.metadata
import importlib.util
import platform
import shutil

import torch

from .. import __version__
from ..devices import available_memory, has_int_mm, int_mm_pays, pick_device
from ..dispatch import whole_name, why_not
from ..files import human_bytes
from ..int8 import kitchen
from ..selfcheck import prove
from ..wan import fused
from .cards import here

# import name, distributions that carry it, what it is for
LIBRARIES = (
    ("triton", ("triton", "triton-windows", "pytorch-triton-rocm"), "compiles the kernels"),
    ("comfy_kitchen", ("comfy-kitchen",), "int8 layouts inside ComfyUI"),
    ("sageattention", ("sageattention",), "not used: the low-bit attention here is its own"),
    ("av", ("av",), "writing MP4"),
    ("sentencepiece", ("sentencepiece",), "the tokenizer outside ComfyUI"),
    ("tokenizers", ("tokenizers",), "the tokenizer where it is a tokenizer.json"),
    ("PIL", ("pillow",), "images and contact sheets"),
    ("rich", ("rich",), "progress bars"),
    ("ftfy", ("ftfy",), "mending wrongly decoded prompts"),
)
PIPELINE = ("av", "sentencepiece", "PIL")


def examine() -> dict[str, list[tuple[str, str]]]:
    """{section: [(item, finding)]}: "machine", "libraries", "paths", "on this card", where it tries the kernels."""
    paths = _paths()
    return {"machine": _machine(), "libraries": _libraries(), "paths": paths, "on this card": here(pick_device())}


def _machine():
    rows = [
        ("turbo-core", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
    ]
    memory = available_memory()
    if memory:
        rows.append(("memory", f"{human_bytes(memory[0])} free of {human_bytes(memory[1])}"))
    return rows + [("card", text) for text in _cards()]


def _cards() -> list[str]:
    if torch.cuda.is_available():
        kind = "ROCm" if torch.version.hip else "CUDA"
        runtime = torch.version.hip or torch.version.cuda
        cards = []
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            size, capability = human_bytes(card.total_memory), f"{card.major}.{card.minor}"
            cards.append(f"{card.name}, {size}, {kind} {runtime}, compute capability {capability}")
        return cards
    if torch.backends.mps.is_available():
        return ["Apple GPU (MPS)"]
    if torch.version.cuda or torch.version.hip:
        return [f"none: torch {torch.__version__} is built for cards, but no card and driver answers"]
    if shutil.which("nvidia-smi"):
        return ["none: there is an NVIDIA driver, but this torch is built for CPUs; install one from pytorch.org"]
    return ["none: this torch is built for CPUs"]


def _libraries():
    return [(name, f"{_version(name, distributions)} ({purpose})") for name, distributions, purpose in LIBRARIES]


def _version(name: str, distributions) -> str:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "present" if importlib.util.find_spec(name) else "not installed"


def _paths():
    device = whole_name(pick_device())
    prove(device)
    bf16 = device.type != "cpu"
    missing = [name for name in PIPELINE if importlib.util.find_spec(name) is None]
    cure = 'pip install "comfyui-turbowan[pipeline]"'
    generate = f"no: {', '.join(missing)} missing. Cure: {cure}" if missing else "yes"
    return [
        ("device", f"{device}, {'bfloat16' if bf16 else 'float32 (bfloat16 is slower on a CPU)'}"),
        ("int8 linear", _int8_linear(device)),
        ("int8 activations", _kernels(device, "quantize", "PyTorch")),
        ("norms", _kernels(device, "norm", "PyTorch, in float32")),
        ("int8 Wan block", "fused, kernel to kernel" if fused.pays(device) else "layer by layer"),
        ("sparse attention", _kernels(device, "sla", "PyTorch, block by block")),
        ("dense attention", "torch scaled_dot_product_attention"),
        ("text encoder", f"PyTorch on {device}"),
        ("VAE", f"PyTorch on {device}; its norms: {_kernels(device, 'vae', 'PyTorch')}"),
        ("generate", generate),
        ("inspect, convert, quantize", "yes"),
    ]


def _kernels(device: torch.device, family: str, otherwise: str) -> str:
    """Triton, or what computes in its place and why."""
    reason = why_not(device, family)
    return "Triton kernels" if reason is None else f"{otherwise}; {reason}"


def _int8_linear(device: torch.device) -> str:
    block, row = (int8_path(device, format) for format in ("block", "row"))
    return block if block == row else f"block format: {block}. Row format: {row}"


def _library_path(name: str, device: torch.device) -> str:
    return f"{name} on {device}" if importlib.util.find_spec(name) else f"none: {name} is not installed"


def int8_path(device, format: str) -> str:
    """Which path int8_linear takes on a device for "block" or "row" weights, and why, in words (turbo-core doctor)."""
    device = torch.device(device)
    reason = why_not(device, "quantize") or why_not(device, "int8_mm")
    if reason is None:
        return "Triton kernels"
    if device.type == "cpu":
        if int_mm_pays(device):
            return "torch._int_mm (exact int32)"
        return "float32 products: this CPU multiplies those faster than int8"
    if format == "row" and kitchen.library(device):
        return f"comfy_kitchen's int8 linear; {reason}"
    if format == "row" and has_int_mm(device):
        return f"torch._int_mm; {reason}"
    return f"float products in torch, which save memory but no time; {reason}"
