"""Make Triton's CPU interpreter (TRITON_INTERPRET=1) compute what a card computes.

As shipped (triton 3.6 to 3.9) it does bf16 and fp8 arithmetic on the raw bits, truncates on the way to bf16, wraps on
the way to fp8, and knows neither libdevice nor inline assembly. `repair()` gives the narrow types float32 arithmetic
with one rounding to nearest even at the end, makes int8 dots exact and fast, and adds the few libdevice functions and
assembly lines that kernels use. Call it once in a process of its own: triton reads TRITON_INTERPRET when a kernel's
module is imported, and interpreted and compiled kernels do not mix.
"""

import numpy as np
import torch

# rounding assembly that libdevice has no name for; a test may add its own lines
ASSEMBLY = {"cvt.rni.f32.f32 $0, $1;": np.rint}


def _round_half_away(x):
    return np.sign(x) * np.floor(np.abs(x) + 0.5)


LIBDEVICE = {"rint": np.rint, "nearbyint": np.rint, "round": _round_half_away, "tanh": np.tanh, "trunc": np.trunc}

_COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
_BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor}
_EXACT_IN_FLOAT32 = 1024  # so many products of two int8 fit under 2^24


class _Narrow:
    """Conversions between a narrow type's bits, as the interpreter holds them, and float32."""

    def __init__(self, tl):
        # triton type -> (torch type, numpy type of the bits, the same width for torch, largest finite value or None)
        self.types = {
            tl.bfloat16: (torch.bfloat16, np.uint16, torch.int16, None),
            tl.float8e4nv: (torch.float8_e4m3fn, np.uint8, torch.uint8, 448.0),
            tl.float8e5: (torch.float8_e5m2, np.uint8, torch.uint8, 57344.0),
        }

    def __contains__(self, dtype):
        return dtype in self.types

    def to_float32(self, data, dtype):
        if dtype not in self.types:
            return data.astype(np.float32)
        torch_type, _, torch_bits, _ = self.types[dtype]
        bits = torch.from_numpy(np.array(data).view(np.int16 if torch_bits == torch.int16 else np.uint8))
        return bits.view(torch_type).float().numpy()

    def from_float32(self, data, dtype, numpy_type):
        if dtype not in self.types:
            return data.astype(numpy_type)
        torch_type, bits, torch_bits, largest = self.types[dtype]
        x = torch.from_numpy(np.array(data, dtype=np.float32))
        if largest is not None:
            x = x.clamp(-largest, largest)  # cvt.satfinite; NaN passes
        return x.to(torch_type).view(torch_bits).numpy().view(bits)


def repair():
    """Patch the interpreter in place. Call before the first launch; a second call changes nothing."""
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "repaired", False):
        return
    builder.repaired = True
    narrow = _Narrow(tl)
    _repair_casts(builder, interpreter, narrow, tl)
    _repair_arithmetic(builder, interpreter, narrow, tl)
    _repair_dot(builder, interpreter, narrow, tl)
    _repair_reductions(interpreter, narrow)
    _add_libdevice(interpreter, tl)
    _add_assembly(builder, interpreter)
    _repair_index(interpreter)


def _repair_casts(builder, interpreter, narrow, tl):
    handle, shipped, shipped_fp = interpreter.TensorHandle, builder.cast_impl, builder.create_fp_to_fp

    def cast(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source not in narrow and target not in narrow:
            return shipped(self, src, dst_type)
        data = narrow.to_float32(src.data, source)
        return handle(narrow.from_float32(data, target, interpreter._get_np_dtype(target)), target)

    def fp_to_fp(self, src, dst_type, rounding_mode):
        if src.dtype.scalar in narrow or dst_type.scalar in narrow:
            return cast(self, src, dst_type)
        return shipped_fp(self, src, dst_type, rounding_mode)

    def value(self, x):
        return handle(narrow.from_float32(np.array([x]), tl.bfloat16, None), tl.bfloat16)

    builder.cast_impl, builder.create_fp_to_fp, builder.get_bf16 = cast, fp_to_fp, value


def _repair_arithmetic(builder, interpreter, narrow, tl):
    handle = interpreter.TensorHandle
    shipped_unary, shipped_binary, shipped_ternary, shipped_fma = (
        builder.unary_op,
        builder.binary_op,
        builder.ternary_op,
        builder.create_fma,
    )

    def floats(*operands):
        return [narrow.to_float32(x.data, x.dtype.scalar) for x in operands]

    def rounded(data, dtype):
        return handle(narrow.from_float32(data, dtype, None), dtype)

    def unary(self, x, op):
        dtype = x.dtype.scalar
        return rounded(op(*floats(x)), dtype) if dtype in narrow else shipped_unary(self, x, op)

    def binary(self, x, y, op):
        dtype = x.dtype.scalar
        if dtype not in narrow or op in _BITWISE:
            return shipped_binary(self, x, y, op)
        data = op(*floats(x, y))
        return handle(data, tl.int1) if op in _COMPARISONS else rounded(data, dtype)

    def ternary(self, x, y, z, op):
        if op is np.where or z.dtype.scalar not in narrow:  # a select moves bits, whatever they mean
            return shipped_ternary(self, x, y, z, op)
        return rounded(op(*floats(x, y, z)), z.dtype.scalar)

    def fma(self, x, y, z):
        if z.dtype.scalar not in narrow:
            return shipped_fma(self, x, y, z)
        a, b, c = (t.astype(np.float64) for t in floats(x, y, z))
        return rounded(a * b + c, z.dtype.scalar)

    builder.unary_op, builder.binary_op, builder.ternary_op, builder.create_fma = unary, binary, ternary, fma


def _repair_dot(builder, interpreter, narrow, tl):
    handle = interpreter.TensorHandle

    def dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        dtype = acc.dtype.scalar
        if a.dtype.scalar in (tl.int8, tl.uint8):
            wide = np.float32 if a.data.shape[-1] <= _EXACT_IN_FLOAT32 else np.float64
            product = np.matmul(a.data.astype(wide), b.data.astype(wide)).astype(np.int32)
            return handle(product + acc.data, dtype)
        if a.dtype.scalar == tl.float64:
            return handle(np.matmul(a.data, b.data) + acc.data, dtype)
        x, y = (narrow.to_float32(t.data, t.dtype.scalar) for t in (a, b))
        total = np.matmul(x, y) + narrow.to_float32(acc.data, dtype)
        return handle(narrow.from_float32(total, dtype, acc.data.dtype), dtype)

    builder.create_dot = dot


def _repair_reductions(interpreter, narrow):
    ops = interpreter.ReduceOps
    shipped_sum, shipped_min_max = ops.sum, ops.min_max

    def first(tensors):
        return tensors[0] if isinstance(tensors, tuple) else tensors

    def reduced(self, x, op):
        dtype = x.dtype.scalar
        data = op(narrow.to_float32(x.handle.data, dtype), axis=self.axis, keepdims=self.keep_dims)
        bits = narrow.from_float32(np.asarray(data), dtype, None)
        return self.to_tensor(bits if bits.shape else bits[()], x.dtype)

    def sum_(self, tensors):
        x = first(tensors)
        return reduced(self, x, np.sum) if x.dtype.scalar in narrow else shipped_sum(self, tensors)

    def min_max(self, tensors, val_reduce_op=None, idx_reduce_op=None):
        x = first(tensors)
        if x.dtype.scalar in narrow and idx_reduce_op is None:
            return reduced(self, x, val_reduce_op)
        return shipped_min_max(self, tensors, val_reduce_op=val_reduce_op, idx_reduce_op=idx_reduce_op)

    ops.sum, ops.min_max = sum_, min_max


def _add_libdevice(interpreter, tl):
    from triton.language.extra import libdevice

    def elementwise(op):
        def call(x, *_, _semantic=None):
            data = op(x.handle.data).astype(x.handle.data.dtype)
            return tl.tensor(interpreter.TensorHandle(data, x.dtype.scalar), x.type)

        return call

    for name, op in LIBDEVICE.items():
        setattr(libdevice, name, elementwise(op))


def _add_assembly(builder, interpreter):
    class Results:
        """What tl.inline_asm_elementwise expects back for a tuple of results."""

        def __init__(self, handles):
            self.get_result = handles.__getitem__

    def inline_asm(self, text, constraints, values, types, is_pure, pack):
        if text not in ASSEMBLY:
            raise NotImplementedError(f"no twin for the assembly {text!r}: add it to ASSEMBLY in {__name__}")
        data = ASSEMBLY[text](*(v.data for v in values))
        if isinstance(types, (list, tuple)):
            return Results([interpreter.TensorHandle(data, t.scalar) for t in types])
        return interpreter.TensorHandle(data, types.scalar)

    builder.create_inline_asm = inline_asm


def _repair_index(interpreter):
    """A one-element tensor as a loop bound: triton 3.6 calls int() on an array, which numpy 2.4 refuses."""
    shipped = interpreter._patch_lang_tensor

    def index(self):
        return int(self.handle.data.reshape(-1)[0])

    def patch(tensor, *scope):
        result = shipped(tensor, *scope)
        if scope:
            scope[0].set_attr(tensor, "__index__", index)
        else:
            tensor.__index__ = index
        return result

    interpreter._patch_lang_tensor = patch
