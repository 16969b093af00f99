"""What the probes would compile on a card, counted without compiling; runs by test_paths.py, not interpreted."""

import contextlib
from collections import Counter

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from tests.triton_cpu import aot
from turbo_core import dispatch, selfcheck, sla, wan_fused
from turbo_core.kernels import int8_configs, launch
from turbo_core.sla import fast

CARD = torch.device("cuda:0")
DIM, FFN, HEADS, TOKENS, TEXT = 5120, 13824, 40, 1100, 512  # the 14B model, of a video the length alone is short


@pytest.fixture(params=[80, 90])
def specialized(request, monkeypatch):
    """specialized(function, ...): (kernel, key of its compilation) of every launch the call makes; nothing runs."""
    triton.runtime.driver.set_active(aot._CompileOnly(request.param))
    found = set()
    monkeypatch.setattr(JITFunction, "_do_compile", lambda self, key, *_: found.add((self.fn.__name__, key)))
    monkeypatch.setattr(launch, "_launch", lambda kernel, grid, args, options: kernel[grid](*args, **options))
    monkeypatch.setattr(int8_configs, "card_kind", lambda device: f"sm_{request.param}")
    monkeypatch.setattr(fast, "has_fp8", lambda device: request.param >= 89)
    monkeypatch.setattr(dispatch, "_cannot_run", lambda device: None)
    monkeypatch.setattr(dispatch, "_needs_probe", lambda device: False)

    def call(function, *args):
        found.clear()
        function(*args)
        return set(found)

    return call


def probed(specialized, monkeypatch, family):
    """The same of a probe; its twins are not computed."""

    def launched(device, cases):
        for function, operands, named, _ in cases:
            function(*operands, **named)

    monkeypatch.setattr(selfcheck, "_first_difference", launched)
    return specialized(selfcheck.PROBES[family], CARD)


def test_somebody_waits_for_so_many_compilations(specialized, monkeypatch):
    counts = {family: len(probed(specialized, monkeypatch, family)) for family in selfcheck.PROBES}
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

    def attend_text(q, k, v):
        norm.rms_norm(k[0], norm, 1e-6)
        return norm.rms_norm(q[0], norm, 1e-6)[None]

    x, context = (torch.empty(1, length, DIM, dtype=bf16) for length in (TOKENS, TEXT))
    modulation = [torch.empty(1, DIM) for _ in range(6)]
    wan_fused.block(x, context, modulation, borrow, attend, attend_text, (norm, norm), HEADS, 1e-6)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("rows", [False, True])
def test_what_a_video_launches_has_been_probed(specialized, monkeypatch, rows, precision):
    tried = set().union(*(probed(specialized, monkeypatch, family) for family in selfcheck.PROBES))
    missing = Counter(name for name, _ in specialized(block_of_a_video, rows, precision) - tried)
    # Of the row format: epilogues that the block format has tried, one affine norm and one quantization of other
    # widths, attention that leaves floats, and a short part of ffn.0, which is long in a real video.
    untried = {"int8_mm_kernel": 4, "layer_norm_rows_kernel": 1, "quantize_rows_kernel": 1, "attention_kernel": 1}
    assert missing == (untried if rows else {})
