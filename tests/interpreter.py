"""Repairs of Triton's CPU interpreter (3.6 to 3.9), so that kernels compute there what they compute on a GPU.

bf16 exists in the interpreter as its 16 bits in a numpy uint16 array. Casts, arithmetic and dot are repaired; tl.fma
and reductions of bf16 are not, and no kernel here uses them (statistics are fp32).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _is_bf16(dtype: tl.dtype) -> bool:
    return dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> TensorHandle:
    """bf16 to fp32, exactly: bf16 is the upper half of an fp32. Other handles pass."""
    if not _is_bf16(handle.dtype):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32)


def _narrow(handle: TensorHandle) -> TensorHandle:
    """fp32 to bf16, rounded to nearest even, as the hardware does."""
    bits = np.ascontiguousarray(handle.data, np.float32).view(np.uint32)
    tie_to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    upper = ((bits + tie_to_even) >> np.uint32(16)).astype(np.uint16)
    upper = np.where(np.isnan(handle.data), np.uint16(0x7FC0), upper)  # a NaN's carry would turn it into -0
    return TensorHandle(upper.reshape(handle.data.shape), tl.bfloat16)


def _bf16_casts(cast: Callable) -> Callable:
    """fp32 -> bf16 cut the lower half off instead of rounding; other dtypes -> bf16 copied integers into the bits."""

    def cast_impl(self: Any, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        if _is_bf16(src.dtype) == _is_bf16(dst_type):
            return cast(self, src, dst_type)
        if _is_bf16(src.dtype):
            return cast(self, _widen(src), dst_type)
        return _narrow(cast(self, src, tl.float32))

    return cast_impl


def _bf16_arithmetic(operate: Callable) -> Callable:
    """binary_op(lhs, rhs, op) and unary_op(arg, op) worked on the bits of bf16 as if they were integers."""

    def op_on_numbers(self: Any, *args: Any) -> TensorHandle:
        *handles, op = args
        result = operate(self, *map(_widen, handles), op)
        return _narrow(result) if _is_bf16(handles[0].dtype) and result.data.dtype != np.bool_ else result

    return op_on_numbers


def _bf16_dot(dot: Callable) -> Callable:
    """tl.dot multiplied the bits of bf16 as integers."""

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, _widen(a), _widen(b), *rest)

    return create_dot


def _comparisons_are_int1(operate: Callable) -> Callable:
    """A comparison kept its operands' dtype, so a scalar one became an integer when spread over a block of a mask."""

    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Callable) -> TensorHandle:
        result = operate(self, lhs, rhs, op)
        return TensorHandle(result.data, tl.int1) if result.data.dtype == np.bool_ else result

    return binary_op


def _scalars_index(patch_tensor: Callable) -> Callable:
    """range(0, scalar) called int() on an array of one element, which numpy refuses from 2.4 on."""

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch


def repair() -> None:
    """Apply all of them; once per process."""
    builder = InterpreterBuilder
    if getattr(builder, "repaired", False):
        return
    builder.cast_impl = _bf16_casts(builder.cast_impl)
    builder.binary_op = _comparisons_are_int1(_bf16_arithmetic(builder.binary_op))
    builder.unary_op = _bf16_arithmetic(builder.unary_op)
    builder.create_dot = _bf16_dot(builder.create_dot)
    interpreter._patch_lang_tensor = _scalars_index(interpreter._patch_lang_tensor)
    builder.repaired = True
