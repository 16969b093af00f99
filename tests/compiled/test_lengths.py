"""Videos from one token to 2^20: what is launched stays within what a card takes. Nothing runs."""

import pytest
import torch
from triton.runtime.jit import JITFunction

from tests.helpers import shipped
from turbo_core.int8 import fast as int8_fast
from turbo_core.sla import fast

MOST = (2**31 - 1, 65535, 65535)  # programs of a grid in its three dimensions
ARGUMENT = 2**31 - 1  # sizes are 32 bits wide; what is multiplied beyond that is cast before


@pytest.fixture
def made(monkeypatch):
    """(name, grid, arguments) of every launch."""
    found = []

    def note(kernel, *arguments, grid, **_):
        found.append((kernel.__name__, grid, arguments))

    monkeypatch.setattr(JITFunction, "run", note)
    return found


# 2^19 tokens are the longest row of the kernel that chooses blocks, beyond that torch chooses
@pytest.mark.parametrize("length", [1, 129, 2**19, 2**20])
def test_attention(length, made):
    qkv = shipped.empty(3, 1, length, 40, 128, dtype=torch.bfloat16)
    turn, norm = shipped.empty(length, 64), shipped.empty(5120)
    form = shipped.empty(2, 40, length), norm, norm, 1e-6, turn, turn
    settings = shipped.empty(128, 128), shipped.empty(128), 0.1, None, "int8"
    out, scale = fast.sla_from_qkv_quantized(qkv, *form, *settings)
    assert out.shape == (length, 5120) and scale.shape == (-(-length // 128), 40)
    names = {name for name, *_ in made}
    assert "attention_kernel" in names and ("_select_kernel" in names) == (length <= 2**19)
    check(made)


def check(made):
    for name, grid, arguments in made:
        assert all(0 < size <= most for size, most in zip(grid, MOST)), (name, grid)
        numbers = [x for x in arguments if isinstance(x, int)]
        assert all(abs(x) <= ARGUMENT for x in numbers), (name, numbers)


@pytest.mark.parametrize("length", [1, 129, 2**20])
@pytest.mark.parametrize("rows", [False, True])
def test_products_and_norms(length, rows, made):
    def int8(n, k):
        shape = (n, 1) if rows else (-(-n // 128), k // 128)
        return shipped.empty(n, k, dtype=torch.int8), shipped.empty(*shape)

    x, gate = shipped.empty(length, 5120, dtype=torch.bfloat16), shipped.empty(1, 5120)
    y, scale = int8_fast.layer_norm_quantize(x, 1e-6, shift=gate, scale=gate, rows=rows)
    wide, square, narrow = int8(13824, 5120), int8(5120, 5120), int8(5120, 13824)
    int8_fast.int8_mm_qkv(y, scale, *zip(*[square] * 3))
    if rows:
        inner = int8_fast.quantize_rows(int8_fast.int8_mm(y, scale, *wide, gelu=True))
    else:
        inner = int8_fast.int8_mm_quantize(y, scale, *wide)
    out, _ = int8_fast.int8_mm_residual(*inner, *narrow, None, x, gate, stats=not rows)
    assert out.shape == x.shape and len(made) == (5 if rows else 6)
    check(made)
