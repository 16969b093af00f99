"""Memory that sparse-linear attention takes by the kernels, counted on tensors without data; nothing is launched."""

import weakref
from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from turbo_core.kernels import launch
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


def peak(precision, raw, quantize=False):
    """(peak bytes beside the inputs and the result, bytes of the largest tensor)."""
    b, length, h, d = SHAPE
    qkv = torch.empty(3, *SHAPE, dtype=torch.bfloat16, device="meta")
    weight, bias = torch.empty(d, d, device="meta"), torch.empty(d, device="meta")
    form = fast.NO_RAW
    if raw:
        turn = torch.empty(length, d // 2, device="meta")
        norm = torch.empty(h * d, device="meta")
        form = torch.empty(2, h, b * length, device="meta"), norm, norm, 1e-6, turn, turn
    with Peak() as seen, torch.no_grad():
        out = fast.attend(*qkv, weight, bias, 0.1, None, precision, form, quantize)
    result = sum(x.untyped_storage().nbytes() for x in (out if quantize else (out,)))
    return seen.most - result, seen.largest


# ceilings in MB, a little above what the docstring of turbo_core/sla.py says
@pytest.mark.parametrize(
    "precision, raw, quantize, low, high",
    [
        ("bf16", False, False, 10, 40),
        ("bf16", True, True, 780, 830),  # k after norm and RoPE
        ("int8", False, False, 780, 830),  # k in int8, v in fp8
        ("int8", True, True, 780, 830),
    ],
)
def test_peak_at_14b_720p_is_what_is_stated(precision, raw, quantize, low, high):
    maps = set()

    def launched(kernel, grid, arguments, options):
        if kernel.__name__ == "attention_kernel":
            maps.update(x.nbytes for x in arguments if isinstance(x, torch.Tensor) and x.dtype == torch.int32)

    nothing = patch.object(launch, "_launch", launched)
    with nothing, patch.object(fast, "has_fp8", lambda device: True):
        extra, largest = peak(precision, raw, quantize)
    print(f"{precision} raw {raw} quantize {quantize}: {extra / 1e6:.0f} MB")
    assert low < extra / 1e6 < high
    assert largest <= 2 * 75600 * 5120
    assert len(maps) == 1 and 10e6 < maps.pop() < 12e6  # the block map
