"""The polynomial GELU of half-precision outputs: every bf16 and fp16 number, and the proof of its bound in fp32."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from bert_fast.kernels.activation import GELU_CENTER, GELU_LIMIT, GELU_P, activate
from bert_fast.kernels.runtime import tl, triton

BOUND = 1.3e-5  # promised by _gelu_poly's docstring, before the output is rounded
P = np.array(GELU_P.value, np.float32)
LIMIT, CENTER = GELU_LIMIT.value, GELU_CENTER.value
HALF = {torch.bfloat16: 1 << 7, torch.float16: 1 << 10}  # ulps in a power of two


@triton.jit
def _gelu_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = activate(tl.load(x_ptr + cols).to(tl.float32), "gelu", False)
    tl.store(y_ptr + cols, y.to(y_ptr.dtype.element_ty))


def gelu(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The kernels' device function on the CPU; x has a multiple of 4096 elements."""
    y = torch.empty(x.shape, dtype=dtype)
    _gelu_kernel[(x.numel() // 4096,)](x, y, BLOCK=4096)
    return y


def exact(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return 0.5 * x * torch.erfc(x * -(0.5**0.5))  # erfc: right far below zero too


def fit(degree: int, margin: float = 3e-7, points: int = 1000, rounds: int = 300) -> tuple[np.ndarray, float]:
    """P's coefficients, highest first, and the largest |x^2 * (P - exact)|: Lawson's reweighted least squares.

    P(z) = end + (z - z_end) Q(z) holds LIMIT * P = 0.5 + margin at LIMIT, so that Phi is clamped from there on.
    """
    x = LIMIT * np.sin(np.pi / 2 * np.arange(1, points + 1) / points)
    z, z_end, end = x * x - CENTER, LIMIT**2 - CENTER, (0.5 + margin) / LIMIT
    wanted = exact(torch.from_numpy(x)).numpy() - 0.5 * x - x * x * end
    basis = (x * x * (z - z_end))[:, None] * np.vander(z / z_end, degree)
    weights = np.ones(points)
    for _ in range(rounds):
        root = np.sqrt(weights)
        q = np.linalg.lstsq(basis * root[:, None], wanted * root, rcond=None)[0]
        error = np.abs(basis @ q - wanted)
        weights = weights * error / np.sum(weights * error)
    p = np.polymul(q / z_end ** np.arange(degree - 1, -1.0, -1), [1.0, -z_end])
    p[-1] += end
    return p, float(error.max())


def evaluate(x: np.ndarray, fused: bool) -> tuple[np.ndarray, np.ndarray]:
    """_gelu_poly in fp32 operations, its multiply-adds fused or not: the result, and Phi before the clamp."""

    def multiply_add(a: np.ndarray, b: np.ndarray, c: float) -> np.ndarray:
        if fused:  # products of fp32 are exact in float64
            return (a.astype(np.float64) * b + c).astype(np.float32)
        return a * b + np.float32(c)

    with np.errstate(over="ignore"):  # the square of a large x
        z = np.minimum(multiply_add(x, x, -CENTER), np.float32(LIMIT**2 - CENTER))
    p = np.full_like(x, P[0])
    for coefficient in P[1:]:
        p = multiply_add(p, z, coefficient)
    phi = multiply_add(p, x, 0.5)
    return x * np.clip(phi, np.float32(0), np.float32(1)), phi


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", HALF)
def test_every_half_precision_input(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    y, truth = gelu(x, dtype), exact(x)
    assert torch.equal(y.isnan(), x.isnan() | (x == -float("inf")))  # 0 * inf, as in the formula
    assert y[x == float("inf")].item() == float("inf")
    finite = x.isfinite()
    x, y, truth = x[finite], y[finite].double(), truth[finite]
    tiny = torch.tensor(torch.finfo(dtype).smallest_normal, dtype=torch.float64)
    ulp = torch.exp2(torch.floor(torch.log2(torch.maximum(truth.abs(), tiny)))) / HALF[dtype]
    assert ((y - truth).abs() <= 0.5 * ulp + BOUND).all()
    assert torch.equal(y[x >= LIMIT], x[x >= LIMIT].double()) and (y[x <= -LIMIT] == 0).all()


@pytest.mark.interpreter
def test_proof_is_of_the_kernel() -> None:
    x = torch.linspace(-8, 8, 1 << 16)
    assert np.array_equal(gelu(x, torch.float32).numpy(), evaluate(x.numpy(), False)[0])


@pytest.mark.parametrize("fused", [False, True])
def test_bound_over_fp32(fused: bool) -> None:
    """Every 16th fp32 number of 2^-6..8, all near the limit, and some of every size."""
    first, last, limit = (int(np.float32(v).view(np.int32)) for v in (2**-6, 8, LIMIT))
    bits = np.r_[first:last:16, limit - 5000 : limit + 5000, 0:first:10007]
    x = bits.astype(np.int32).view(np.float32)
    x = np.r_[-x, x]
    error = np.abs(evaluate(x, fused)[0] - exact(torch.from_numpy(x)).numpy())
    assert error.max() <= BOUND
    wide = x.astype(np.float64)
    assert (error <= 1e-4 * wide**2 + 1e-7 * np.abs(wide) + 2.0**-149).all()
    large = np.r_[x[x >= LIMIT], np.logspace(0.7, 38.5, 5000).astype(np.float32), np.finfo(np.float32).max]
    assert (evaluate(large, fused)[0] == large).all() and (evaluate(-large, fused)[0] == 0).all()
    assert (evaluate(large, fused)[1] > 1).all(), "clamped with an ulp to spare, however it is rounded"


def test_coefficients_are_the_fit() -> None:
    """No polynomial of this degree is much better than P, none of a degree less is good enough."""
    p, error = fit(len(P) - 1)
    z = np.linspace(-CENTER, LIMIT**2 - CENTER, 1000)
    assert np.abs((z + CENTER) * (np.polyval(p, z) - np.polyval(P.astype(float), z))).max() < 1.5e-6
    assert error < 0.95 * BOUND
    assert fit(len(P) - 2)[1] > 2e-5
