"""One share of a warm-up, in a process of its own: see warm.py, which starts it and reads what it says.

The launches are those of the proofs in selfcheck, and of a Wan block of each model that is named. They are collected
with operands on the CPU, whatever card they are compiled for: alignment, integers and types specialize a kernel there
as on the card, so what is compiled is what the card will look for in Triton's cache.
"""

import contextlib
import json
import sys
import time

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import KernelInterface

from .. import dispatch, selfcheck, sla
from ..int8 import BLOCK
from ..int8 import fast as int8_fast
from ..kernels import int8_configs
from ..pipeline.text import TEXT_LENGTH
from ..sla import fast as sla_fast
from ..wan import fused

CPU = torch.device("cpu")
KINDS = (120, 100, 90, 86, 80)  # of the launch table, see kernels.int8_configs


class CompileOnly(DriverBase):
    """A driver that knows its target, (backend, architecture, threads of a warp), and nothing else."""

    def __init__(self, backend="cuda", arch=90, warp=32):
        self.target = GPUTarget(backend, arch, warp)

    @classmethod
    def is_active(cls):
        return False

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return CPU

    def get_benchmarker(self):
        return lambda call, **options: [1.0, 1.0, 1.0]

    def get_current_device(self):
        return self.target.arch  # kernels are cached by device

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, *_):
        return divmod(self.target.arch, 10)


def main() -> None:
    """Read a job from standard input; one line of JSON for the count, then one for each launch that was compiled."""
    job = json.load(sys.stdin)
    pretend(*job["target"], job["card"])
    found = launches(job["videos"])[job["share"] :: job["of"]]
    print(json.dumps({"launches": len(found)}), flush=True)
    for kernel, arguments, options in found:
        start, said = time.perf_counter(), {"kernel": kernel.fn.__name__}
        try:
            said["hash"] = kernel.warmup(*arguments, grid=(1,), **options).hash
        except Exception as error:  # a compiler's: the proof on the card will say what it means
            said["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        print(json.dumps(said | {"seconds": time.perf_counter() - start}), flush=True)


def pretend(backend: str, arch, warp: int, card: str | None) -> None:
    """Let this process take the CPU for a card with proved kernels. card: its name, for the table tuned on it."""
    triton.runtime.driver.set_active(CompileOnly(backend, arch, warp))
    kind = "hip" if backend == "hip" else f"sm_{next(kind for kind in KINDS if kind <= arch)}"
    table = int8_configs.read_table(int8_configs.table_path(card), card) if card else {}
    int8_configs.card_kind = lambda device: kind
    int8_configs.tuned_table = lambda device: table
    sla_fast.has_fp8 = lambda device: backend == "cuda" and arch >= 89
    for family in dispatch.FAMILIES:
        dispatch.record(CPU, family, None)


def launches(videos) -> list[tuple]:
    """(kernel, arguments, options) of everything that is to be compiled, in the same order in every process."""
    with collected() as found, torch.no_grad():
        for family in selfcheck.CHECKS:
            with _without_references():
                selfcheck.CHECKS[family](torch.device("cuda", 0))
        for video in videos:
            block_of_a_video(**video)
    return list(found.values())


@contextlib.contextmanager
def collected():
    """A dictionary that takes every launch by what specializes it; nothing runs meanwhile."""
    found, usual = {}, KernelInterface.__getitem__

    def noted(kernel, grid):
        def take(*arguments, **options):
            described = [_described(argument) for argument in (*arguments, *options.values())]
            found.setdefault((kernel.fn.__name__, *described, *options), (kernel, arguments, options))

        return take

    KernelInterface.__getitem__ = noted
    try:
        yield found
    finally:
        KernelInterface.__getitem__ = usual


def _described(argument):
    return (argument.dtype, argument.data_ptr() % 16) if isinstance(argument, torch.Tensor) else argument


@contextlib.contextmanager
def _without_references():
    """The checks of selfcheck launch, with their operands on the CPU, and compare nothing."""

    def launched(device, fast, reference, cases):
        for name, operands, named, _ in cases:
            getattr(fast, name)(*operands, **named)

    usual, selfcheck._first_difference = selfcheck._first_difference, launched
    try:
        yield
    finally:
        selfcheck._first_difference = usual


def block_of_a_video(dim: int, ffn: int, heads: int, tokens: int, rows: bool, precision: str, topk: float) -> None:
    """One W8A8 block of a model in bfloat16, batch 1, on the kernels' path, of values that nobody reads.

    rows: the row format. Attention to the text is torch's, and left out.
    """
    bf16 = torch.bfloat16

    def layer(name):
        n, k = {"ffn.0": (ffn, dim), "ffn.2": (dim, ffn)}.get(name, (dim, dim))
        scale = torch.empty((n, 1) if rows else (-(-n // BLOCK), -(-k // BLOCK)))
        return torch.empty(n, k, dtype=torch.int8), scale, torch.empty(n, dtype=bf16)

    def borrow(*names):
        return contextlib.nullcontext([layer(name) for name in names])

    norm = torch.empty(dim)  # checkpoint.loading and WanModel keep the weights of norms in float32

    def attend(qkv, sums, quantized):
        width = dim // heads
        turn, proj = torch.empty(2, tokens, width // 2), (torch.empty(width, width), torch.empty(width))
        qkv = qkv.unflatten(-1, (heads, -1))
        out = sla.sla_from_qkv(qkv, sums, norm, norm, 1e-6, *turn, *proj, topk, precision, quantized)
        return out if isinstance(out, tuple) else out.flatten(2)

    def attend_text(q, project):
        k, _ = project()
        int8_fast.rms_norm(k[0], norm, 1e-6)
        return int8_fast.rms_norm(q[0], norm, 1e-6)[None]

    x, context = (torch.empty(1, length, dim, dtype=bf16) for length in (tokens, TEXT_LENGTH))
    modulation = [torch.empty(1, dim) for _ in range(6)]
    fused.block(x, context, modulation, borrow, attend, attend_text, (norm, norm), heads, 1e-6)


if __name__ == "__main__":
    main()
