"""What selfcheck would compile on a card, counted without compiling; what a video launches is among it."""

import contextlib
from collections import Counter

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from tests.helpers import aot
from turbo_core import dispatch, selfcheck, sla
from turbo_core.int8 import fast as int8_fast
from turbo_core.kernels import int8_configs
from turbo_core.sla import fast
from turbo_core.wan import fused

CARD, CPU = torch.device("cuda:0"), torch.device("cpu")
DIM, FFN, HEADS, TOKENS, TEXT = 5120, 13824, 40, 1100, 512  # the 14B model, of a video the length alone is short


@pytest.fixture(params=[80, 90])
def specialized(request, monkeypatch):
    """specialized(function, ...): (kernel, key of its compilation) of every launch the call makes; nothing runs."""
    driver = aot.CompileOnly(request.param)
    driver.get_current_device = lambda: "a card that has compiled nothing yet"
    triton.runtime.driver.set_active(driver)
    found = set()
    monkeypatch.setattr(JITFunction, "_do_compile", lambda self, key, *_: found.add((self.fn.__name__, key)))
    monkeypatch.setattr(int8_configs, "card_kind", lambda device: f"sm_{request.param}")
    monkeypatch.setattr(fast, "has_fp8", lambda device: request.param >= 89)
    monkeypatch.setattr(dispatch, "_verdicts", {(CPU, family): None for family in dispatch.FAMILIES})

    def call(function, *args):
        found.clear()
        function(*args)
        return set(found)

    return call


def tried(specialized, monkeypatch, family):
    """The same of a check on a card; its operands stay on the CPU and its references are not computed."""

    def launched(device, fast, reference, cases):
        for name, operands, named, _ in cases:
            getattr(fast, name)(*operands, **named)

    monkeypatch.setattr(selfcheck, "_first_difference", launched)
    return specialized(selfcheck.CHECKS[family], CARD)


def test_somebody_waits_for_so_many_compilations(specialized, monkeypatch):
    counts = {family: len(tried(specialized, monkeypatch, family)) for family in selfcheck.CHECKS}
    assert counts == {"quantize": 3, "norm": 9, "int8_mm": 13, "sla": 15}


def block_of_a_video(rows, precision):
    """One block of the 14B model in bfloat16, batch 1, of values that nobody reads."""
    bf16 = torch.bfloat16

    def layer(name):
        n, k = {"ffn.0": (FFN, DIM), "ffn.2": (DIM, FFN)}.get(name, (DIM, DIM))
        scale = torch.empty((n, 1) if rows else (n // 128, k // 128))
        return torch.empty(n, k, dtype=torch.int8), scale, torch.empty(n, dtype=bf16)

    def borrow(*names):
        return contextlib.nullcontext([layer(name) for name in names])

    norm = torch.empty(DIM, dtype=bf16)

    def attend(qkv, sums, quantized):
        turn = torch.empty(2, TOKENS, 64)
        proj = torch.empty(128, 128), torch.empty(128)
        heads = qkv.unflatten(-1, (HEADS, -1))
        out = sla.sla_from_qkv(heads, sums, norm, norm, 1e-6, *turn, *proj, 0.3, precision, quantized)
        return out if isinstance(out, tuple) else out.flatten(2)

    def attend_text(q, project):
        k, _ = project()
        int8_fast.rms_norm(k[0], norm, 1e-6)
        return int8_fast.rms_norm(q[0], norm, 1e-6)[None]

    x, context = (torch.empty(1, length, DIM, dtype=bf16) for length in (TOKENS, TEXT))
    modulation = [torch.empty(1, DIM) for _ in range(6)]
    fused.block(x, context, modulation, borrow, attend, attend_text, (norm, norm), HEADS, 1e-6)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("rows", [False, True])
def test_what_a_video_launches_has_been_tried(specialized, monkeypatch, rows, precision):
    known = set().union(*(tried(specialized, monkeypatch, family) for family in selfcheck.CHECKS))
    missing = Counter(name for name, _ in specialized(block_of_a_video, rows, precision) - known)
    # Of the row format: epilogues that the block format has tried, one affine norm and one quantization of other
    # widths, attention that leaves floats, and a short part of ffn.0, which is long in a real video.
    untried = {"int8_mm_kernel": 4, "layer_norm_rows_kernel": 1, "quantize_rows_kernel": 1, "attention_kernel": 1}
    assert missing == (untried if rows else {})
