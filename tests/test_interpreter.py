"""The four repairs of Triton's interpreter (tests/interpreter.py) and the poisoned memory (tests/conftest.py).

Each kernel here is wrong, or raises, in an unrepaired interpreter of Triton 3.6, 3.9 or both.
"""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = pytest.mark.interpreter

# halves of the last place of bf16 (ties to even, both ways), carries into the exponent and to inf, and specials
ROUNDED = (1 + 2**-8, 1 + 3 * 2**-8, 1.999, -1.999, 0.1, 3.39e38, -3.4e38, 1e-40, float("inf"), -float("inf"), 0, -0.0)


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    cols = tl.arange(0, N)
    y = tl.load(x_ptr + cols).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + cols, y)


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, less_ptr, N: tl.constexpr):
    cols = tl.arange(0, N)
    x = tl.load(x_ptr + cols)
    y = tl.load(y_ptr + cols)
    tl.store(out_ptr + cols, x + y)
    tl.store(out_ptr + N + cols, x * y)
    tl.store(out_ptr + 2 * N + cols, -x)
    tl.store(less_ptr + cols, x < y)


@triton.jit
def _dot_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    square = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    acc = tl.full((N, N), 1.0, tl.float32)
    tl.store(out_ptr + square, tl.dot(tl.load(x_ptr + square), tl.load(y_ptr + square), acc))


@triton.jit
def _range_kernel(n_ptr, out_ptr):
    total = 0
    for k in range(0, tl.load(n_ptr)):
        total += k
    tl.store(out_ptr, total)


@triton.jit
def _mask_kernel(n_ptr, out_ptr, N: tl.constexpr):
    cols = tl.arange(0, N)
    live = tl.load(n_ptr) > 2
    tl.store(out_ptr + cols, cols, mask=(cols < 5) & live)
    tl.store(out_ptr + N + cols, cols, mask=live & (cols < 5))
    tl.store(out_ptr + 2 * N + cols, cols, mask=(cols < 5) & (tl.load(n_ptr) > 4))


def test_bf16_rounds_to_nearest_even() -> None:
    x = torch.cat([torch.tensor(ROUNDED), torch.randn(52, generator=torch.Generator().manual_seed(0))])
    y = torch.empty(64, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, y, 64)
    assert torch.equal(y, x.bfloat16()) and torch.equal(y.signbit(), x.signbit())


def test_bf16_keeps_nan() -> None:
    """A NaN of all ones carries into the sign when it is rounded like a number."""
    x = torch.full((4,), -1, dtype=torch.int32).view(torch.float32)
    y = torch.zeros(4, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, y, 4)
    assert y.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32])
def test_bf16_to_other_dtypes_and_back(dtype: torch.dtype) -> None:
    x = torch.tensor([-3.0, 0.0, 1.0, 200.0])
    other, back = torch.empty(4, dtype=dtype), torch.empty(4, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x.bfloat16(), other, 4)
    _cast_kernel[(1,)](other, back, 4)
    assert torch.equal(other, x.to(dtype)) and torch.equal(back, x.bfloat16())


def test_bf16_arithmetic() -> None:
    x, y = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    out, less = torch.empty(3, 16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.bool)
    _arithmetic_kernel[(1,)](x, y, out, less, 16)
    assert torch.equal(out, torch.stack([x + y, x * y, -x]))
    assert torch.equal(less, x < y)


def test_bf16_dot() -> None:
    x, y = torch.randint(-8, 9, (2, 16, 16), generator=torch.Generator().manual_seed(0)).bfloat16()  # exact in fp32
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](x, y, out, 16)
    assert torch.equal(out, x.float() @ y.float() + 1)


def test_range_of_a_loaded_bound() -> None:
    out = torch.empty(1, dtype=torch.int32)
    _range_kernel[(1,)](torch.tensor([5], dtype=torch.int32), out)
    assert out.item() == 10


def test_block_mask_and_scalar_mask() -> None:
    out = torch.full((3, 8), -1, dtype=torch.int32)
    _mask_kernel[(1,)](torch.tensor([4], dtype=torch.int32), out, 8)
    written = [0, 1, 2, 3, 4, -1, -1, -1]
    assert out.tolist() == [written, written, [-1] * 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64])
def test_unwritten_memory_shows(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 5, dtype=dtype)
    for y in (torch.empty(7, dtype=dtype), x.new_empty(2, 3), torch.empty_like(x), x.new_empty(4, dtype=dtype)):
        assert (y.isnan() if dtype.is_floating_point else y == torch.iinfo(dtype).max).all()
