"""What selfcheck would compile on a card, counted without compiling; what a video launches is among it."""

from collections import Counter

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from turbo_core import dispatch, selfcheck
from turbo_core.diagnostics import compiling
from turbo_core.kernels import int8_configs
from turbo_core.sla import fast

CARD, CPU = torch.device("cuda:0"), torch.device("cpu")
MODEL = 5120, 13824, 40, 1100  # the 14B model, of a video the length alone is short


@pytest.fixture(params=[80, 90])
def specialized(request, monkeypatch):
    """specialized(function, ...): (kernel, key of its compilation) of every launch the call makes; nothing runs."""
    driver = compiling.CompileOnly("cuda", request.param)
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
    assert counts == {"quantize": 3, "norm": 13, "int8_mm": 12, "sla": 15, "vae": 3}


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("rows", [False, True])
def test_what_a_video_launches_has_been_tried(specialized, monkeypatch, rows, precision):
    known = set().union(*(tried(specialized, monkeypatch, family) for family in selfcheck.CHECKS))
    launched = specialized(compiling.block_of_a_video, *MODEL, rows, precision, 0.3)
    missing = Counter(name.replace("_persistent", "") for name, _ in launched - known)
    # Of the row format: epilogues that the block format has tried, one affine norm and one quantization of other
    # widths, attention that leaves floats, and a short part of ffn.0, which is long in a real video.
    untried = {"int8_mm_kernel": 3, "layer_norm_rows_kernel": 1, "quantize_rows_kernel": 1, "attention_kernel": 1}
    assert missing == (untried if rows else {})


def test_what_is_warmed_is_what_the_proof_and_a_video_launch(specialized, monkeypatch):
    """Launches are told apart by what specializes them, not by Triton's key: no two may fall together."""
    video = dict(zip(("dim", "ffn", "heads", "tokens"), MODEL), rows=True, precision="bf16", topk=0.3)
    found = compiling.launches([video])

    def compile_all():
        for kernel, arguments, options in found:
            kernel.warmup(*arguments, grid=(1,), **options)

    warmed = specialized(compile_all)
    known = set().union(*(tried(specialized, monkeypatch, family) for family in selfcheck.CHECKS))
    assert warmed == known | specialized(lambda: compiling.block_of_a_video(**video))
