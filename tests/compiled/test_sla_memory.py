"""Memory that sparse-linear attention takes by the kernels, counted on tensors without data; nothing is launched."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from turbo_core.sla import fast

SHAPE = (1, 75600, 40, 128)  # 14B at 720p


class Peak(TorchDispatchMode):
    """The most bytes that lived at a time in storages made under this mode, and the largest one."""

    def __init__(self):
        super().__init__()
        self.seen, self.live, self.most, self.largest = set(), 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in known | self.seen:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage):
        size, key = storage.nbytes(), storage._cdata
        self.seen.add(key)
        self.live += size
        self.most, self.largest = max(self.most, self.live), max(self.largest, size)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size):
        self.seen.discard(key)
        self.live -= size


def peak(precision, raw):
    """(peak bytes beside the inputs and the result, bytes of the largest tensor); raw: from qkv to int8."""
    b, length, h, d = SHAPE
    qkv = torch.empty(3, *SHAPE, dtype=torch.bfloat16, device="meta")
    settings = torch.empty(d, d, device="meta"), torch.empty(d, device="meta"), 0.1, None
    turn, norm = torch.empty(length, d // 2, device="meta"), torch.empty(h * d, device="meta")
    form = torch.empty(2, h, b * length, device="meta"), norm, norm, 1e-6, turn, turn
    with Peak() as seen, torch.no_grad():
        if raw:
            out = fast.sla_from_qkv_quantized(qkv, *form, *settings, precision)
        else:
            out = (fast.sparse_linear_attention(*qkv, *settings, 128, 64, precision),)
    return seen.most - sum(x.untyped_storage().nbytes() for x in out), seen.largest


# ceilings in MB, a little above what the docstring of turbo_core/sla says
@pytest.mark.parametrize(
    "precision, raw, low, high",
    [
        ("bf16", False, 10, 40),
        ("bf16", True, 780, 830),  # k after norm and RoPE
        ("int8", False, 780, 830),  # k in int8, v in fp8
        ("int8", True, 780, 830),
    ],
)
def test_peak_at_14b_720p_is_what_is_stated(precision, raw, low, high, monkeypatch):
    maps = set()

    def launched(kernel, *arguments, **_):
        if kernel.__name__ == "attention_kernel":
            maps.update(x.nbytes for x in arguments if isinstance(x, torch.Tensor) and x.dtype == torch.int32)

    monkeypatch.setattr(JITFunction, "run", launched)
    monkeypatch.setattr(fast, "has_fp8", lambda device: True)
    extra, largest = peak(precision, raw)
    print(f"{precision} raw {raw}: {extra / 1e6:.0f} MB")
    assert low < extra / 1e6 < high
    assert largest <= 2 * 75600 * 5120
    assert len(maps) == 1 and 10e6 < maps.pop() < 12e6  # the block map
