"""Makes bfloat16 value-correct in Triton's interpreter: dot, arithmetic and casts, not reductions.

Triton 3.7.1 interprets bfloat16 as raw 16-bit patterns and upstream declined a fix (triton#11585). `install()` once,
before any kernel runs.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _widen(handle):
    if handle.dtype.scalar == tl.bfloat16:
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data


def _narrow(values):
    """float32 to bfloat16 bits, to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle):
    return getattr(handle.dtype, "scalar", handle.dtype) == tl.bfloat16


def install():
    builder = InterpreterBuilder
    binary_op, unary_op, cast_impl, create_dot = (
        builder.binary_op, builder.unary_op, builder.cast_impl, builder.create_dot,
    )  # fmt: skip

    def bf16_binary_op(self, lhs, rhs, op):
        if not (_is_bf16(lhs) or _is_bf16(rhs)):
            return binary_op(self, lhs, rhs, op)
        out = op(_widen(lhs), _widen(rhs))
        return TensorHandle(out, tl.int1) if out.dtype == np.bool_ else TensorHandle(_narrow(out), tl.bfloat16)

    def bf16_unary_op(self, arg, op):
        return TensorHandle(_narrow(op(_widen(arg))), tl.bfloat16) if _is_bf16(arg) else unary_op(self, arg, op)

    def bf16_cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(_narrow(src.data).reshape(src.data.shape), tl.bfloat16)
        return cast_impl(self, src, dst_type)

    def bf16_create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (TensorHandle(_widen(h), tl.float32) if _is_bf16(h) else h for h in (a, b))
        return create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    builder.binary_op, builder.unary_op = bf16_binary_op, bf16_unary_op
    builder.cast_impl, builder.create_dot = bf16_cast_impl, bf16_create_dot
    for name in ("fp_ext", "fp_trunc", "si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "int_cast"):
        setattr(builder, f"create_{name}", lambda self, src, dst, *rest: self.cast_impl(src, dst))
