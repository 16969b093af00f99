"""Correctness of everything that has a kernel, on the machine at hand, before anybody is told a time.

Shapes are those that kernels trip over: one row, a few, 120 of 128, ragged columns, one token, batches.
"""

import torch

from ..dispatch import FLOATS
from ..int8 import quantize_block, quantize_rows
from ..selfcheck import prove
from . import attention, harness, linear, streaming

LINEAR = ((1, 128, 128), (5, 200, 320), (120, 384, 128), (248, 130, 1536), (300, 384, 320))  # (M, N, K)
STREAMING = ((1, 128), (5, 200), (120, 5120), (377, 1536))  # (M, K)
ATTENTION = ((1, 1, 1, 64), (2, 2, 63, 128), (1, 2, 720, 64), (2, 1, 1000, 128))  # (B, H, L, D)


def _same_bits(device, quantize, m, k):
    """Quantization against plain operations, bit for bit, in every dtype; a strided view among them."""
    generator = torch.Generator(device).manual_seed(m)
    for dtype in FLOATS:
        wide = torch.randn(m, 2 * k, generator=generator, device=device).to(dtype)
        for x in (wide[:, :k], wide[:, k:].contiguous()):
            got, want = quantize(x), linear.CHAINS[quantize](x)
            if not all(torch.equal(a, b) for a, b in zip(got, want)):
                wrong = (got[0] != want[0]).sum().item()
                return f"{dtype}: {wrong} of {m * k} values, or scales, differ from plain operations"
    return None


def _cases(device):
    for shape in LINEAR:
        yield from linear.cases(device, [shape], quick=True)
    for shape in STREAMING:
        yield from streaming.cases(device, [shape], quick=True)
    for shape in ATTENTION:
        yield lambda shape=shape: attention.attention_case(device, *shape, quick=True)
    yield lambda: attention.cross_case(device, 1, 2, 120, 128, quick=True)


def check(device, tell=print, status=None) -> list[dict]:
    """Findings: [{"what", "ok", "said"}]. A family of kernels that a card does not use counts as wrong.

    tell: called with one line for each thing that is wrong. status: called with what is being done.
    """
    device, clock, found = torch.device(device), harness.clock_of(device), []

    def add(what, ok, said):
        found.append({"what": what, "ok": ok, "said": said})
        if not ok:
            tell(f"WRONG: {what}: {said}")

    for family, reason in prove(device).items():
        add(f"{family} kernels", reason is None or device.type != "cuda", reason or "in use")
    for quantize in (quantize_block, quantize_rows):
        for m, k in STREAMING:
            said = _same_bits(device, quantize, m, k)
            add(f"{quantize.__name__} {m} x {k}", said is None, said or "same bits")
    cases = list(_cases(device))
    for done, make in enumerate(cases):
        try:
            case = make()
        except Exception as error:  # a kernel's: the other cases go on
            add(f"case {done + 1} of {len(cases)}", False, harness.in_short(error))
            continue
        if status:
            status(f"check {done + 1} of {len(cases)}: {case.name}")
        for contender in case.contenders:
            if "turbo-core" not in contender.name + contender.note or contender.error is None:
                continue
            row, _ = harness.admit(contender, clock)
            if row["status"] != "missing":
                said = row.get("reason") or f"relative error {row['error']:.1e}"
                add(f"{case.name}: {contender.name}", row["status"] == "ok", said)
    return found
