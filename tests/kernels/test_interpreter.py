"""What helpers/interpreter.py promises of Triton's interpreter: it computes what a card computes."""

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from tests.helpers.interpreter import repair

NARROW = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@triton.jit
def cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(y_ptr.dtype.element_ty))


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at)
    tl.store(out_ptr + at, x + y)
    tl.store(out_ptr + N + at, x * y)
    tl.store(out_ptr + 2 * N + at, -x)
    tl.store(out_ptr + 3 * N + at, tl.where(x < y, x, y))
    tl.store(out_ptr + 4 * N + at, tl.maximum(x, y))
    tl.store(out_ptr + 5 * N + at, tl.zeros((N,), x.dtype) + tl.max(x, 0))


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + n[None, :] * K + k[:, None])
    tl.store(c_ptr + m[:, None] * N + n[None, :], tl.dot(a, b, out_dtype=ACC))


@triton.jit
def rounding_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, libdevice.rint(x))
    tl.store(y_ptr + N + at, libdevice.round(x))
    tl.store(y_ptr + 2 * N + at, libdevice.tanh(x))
    asm: tl.constexpr = "cvt.rni.f32.f32 $0, $1;"
    tl.store(y_ptr + 3 * N + at, tl.inline_asm_elementwise(asm, "=f,f", [x], tl.float32, is_pure=True, pack=1))


def hard_values():
    """float32 values where a cast can go wrong: ties, carries, subnormals, overflow, signed zero, infinities, NaN."""
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    x = bits.view(torch.float32)
    x[:1024] = torch.linspace(-3, 3, 1024)
    x[1024:2048] = (torch.arange(1024) * 2 + 1) * 2.0**-9  # ties of bf16 and of fp8
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 448.0, 464.0, 480.0, -1e9, 1e-40, 57344.0, 61440.0]
    x[2048 : 2048 + len(special)] = torch.tensor(special)
    return x


def saturated(x, dtype):
    """The card's cast: fp8 clamps to the largest finite value, NaN passes."""
    if dtype.itemsize == 1:
        x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_casts_to_narrow_types_round_to_nearest_even(dtype):
    x = hard_values()
    y = torch.empty(x.shape, dtype=dtype)
    cast_kernel[(1,)](x, y, x.numel())
    torch.testing.assert_close(y.float(), saturated(x, dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_casts_from_narrow_types_are_exact(dtype):
    x = saturated(hard_values(), dtype)
    y = torch.empty(x.shape)
    cast_kernel[(1,)](x, y, x.numel())
    torch.testing.assert_close(y, x.float(), rtol=0, atol=0, equal_nan=True)


def test_bf16_arithmetic_rounds_once():
    n = 256
    x, y = torch.randn(2, n, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    out = torch.empty(6, n, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](x, y, out, n)
    expected = torch.stack([x + y, x * y, -x, torch.minimum(x, y), torch.maximum(x, y), x.max().expand(n)])
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", NARROW + [torch.float16], ids=str)
def test_float_dots_are_exact(dtype):
    # small integers: every product and every sum is exact in float32
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randint(-4, 5, (n, 64), generator=generator).to(dtype) for n in (32, 16))
    c = torch.empty(32, 16)
    dot_kernel[(1,)](a, b, c, 32, 16, 64, tl.float32)
    assert torch.equal(c, a.float() @ b.float().t())


@pytest.mark.parametrize("k", [32, 1024, 2048])  # either side of float32's exact range
def test_int8_dots_are_exact(k):
    a, b = torch.full((16, k), -128, dtype=torch.int8), torch.full((16, k), -128, dtype=torch.int8)
    a[::2] = 127
    b[:, ::3] = 126
    c = torch.empty(16, 16, dtype=torch.int32)
    dot_kernel[(1,)](a, b, c, 16, 16, k, tl.int32)
    assert torch.equal(c, a.int() @ b.int().t())


def test_libdevice_and_assembly_have_twins():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.3, -7.7])
    y = torch.empty(4, x.numel())
    rounding_kernel[(1,)](x, y, x.numel())
    away = torch.tensor([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 0.0, -8.0])
    torch.testing.assert_close(y, torch.stack([x.round(), away, x.tanh(), x.round()]))


def test_repair_twice_changes_nothing():
    import triton.runtime.interpreter as interpreter

    before = dict(vars(interpreter.InterpreterBuilder))
    repair()
    assert dict(vars(interpreter.InterpreterBuilder)) == before
