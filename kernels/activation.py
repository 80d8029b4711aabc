"""The activations of `hidden_act` as device functions and as torch functions, under transformers' names.

erf GELU ("gelu"): x * Phi(x), Hendrycks & Gimpel 2016. "gelu_new" and "gelu_pytorch_tanh" are its tanh form.
Source of the names: transformers/activations.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from bert_fast.kernels.runtime import tl, triton

# name in config.hidden_act -> the constexpr ACT of the kernels
KERNEL_NAME = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

TORCH: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
# (dy, x) -> dy * act'(x)
BACKWARD: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "none": lambda dy, x: dy.clone(),
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "relu": partial(torch.ops.aten.threshold_backward, threshold=0),
    "silu": torch.ops.aten.silu_backward,
}

# Minimax fit of (Phi(x) - 0.5) / x on [0, GELU_LIMIT], errors weighed by x^2: highest power of x^2 - GELU_CENTER first.
# P(GELU_LIMIT^2) * GELU_LIMIT is 3e-7 above 0.5, so that from there on Phi is clamped. A degree less: error 2.5e-5.
GELU_LIMIT = tl.constexpr(4.625)
GELU_CENTER = tl.constexpr(10.5)
GELU_DEGREE = tl.constexpr(9)
GELU_P = tl.constexpr(
    (
        *(-1.0650579e-12, 3.631448e-11, -5.6101457e-10, 8.157599e-09, -1.4669916e-07),
        *(2.4122412e-06, -3.507283e-05, 0.00049200235, -0.007238236, 0.15411928),
    )
)


def check_activation(act: str) -> None:
    if act not in TORCH:
        raise ValueError(f"act={act!r}: expected one of {sorted(TORCH)}")


@triton.jit
def _sigmoid(x):
    # exp2 of a large positive argument is inf and 1 / inf is the right limit, 0
    return 1.0 / (1.0 + tl.math.exp2(x * -1.4426950408889634))


@triton.jit
def _sigmoid_and_slope(x, EXACT: tl.constexpr):
    if EXACT:  # 1 - sigmoid loses what is left of it near 1, and a gradient multiplies that by up to 10
        e = tl.math.exp2(tl.abs(x) * -1.4426950408889634)
        r = 1.0 / (1.0 + e)
        return tl.where(x >= 0, r, e * r), e * r * r
    else:
        s = _sigmoid(x)
        return s, s * (1.0 - s)


@triton.jit
def _gelu_poly(x):
    """x * Phi(x) for outputs of at most 11 bits, with no special function: Phi(x) = 0.5 + x * P(x^2), within [0, 1].

    Error before the output is rounded: at most 1.3e-5 and at most 1e-4 * x^2 + 1e-7 * |x|, for every finite fp32 x,
    with or without fused multiply-adds; so a half-precision output is within half its ulp + 1.3e-5. For
    x >= GELU_LIMIT the result is x to the bit, for x <= -GELU_LIMIT zero; NaN, inf and -inf give NaN, inf and NaN, as
    x * Phi(x) does. tests/test_kernels_activation.py fits P again and proves all of this.
    """
    # 13 instructions: the clamp is the multiply-add's saturation. It drops a NaN; the product with x has it again.
    return x * _phi_poly(x)


@triton.jit
def _phi_poly(x):
    # P in powers of x^2 - GELU_CENTER: in powers of x^2, fp32 cancellation alone would cost 5e-5
    z = tl.minimum(x * x - GELU_CENTER, GELU_LIMIT * GELU_LIMIT - GELU_CENTER)
    p = GELU_P[0]
    for i in tl.static_range(1, GELU_DEGREE + 1):
        p = p * z + GELU_P[i]
    return tl.clamp(p * x + 0.5, 0.0, 1.0)


@triton.jit
def activate(x, ACT: tl.constexpr, EXACT: tl.constexpr):
    """fp32 in, fp32 out. EXACT: the library erf (fp32 outputs); else a polynomial good to 1.3e-5 (half outputs)."""
    if ACT == "gelu":
        if EXACT:
            x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
        else:
            x = _gelu_poly(x)
    elif ACT == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) == sigmoid(2 u)
        x = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "relu":
        x = tl.where(x > 0, x, tl.where(x == x, 0.0, x))  # NaN stays NaN, as in torch
    elif ACT == "silu":
        x = x * _sigmoid(x)
    return x


@triton.jit
def activate_backward(d, x, ACT: tl.constexpr, EXACT: tl.constexpr):
    """(d * act'(x), act(x)), fp32 in and out.

    Of the erf GELU, act'(x) = Phi(x) + x * phi(x). Not EXACT: Phi is the polynomial of `_gelu_poly`, whose error of at
    most 1.3e-5 / |x| and 1e-4 * |x| + 1e-7 is at most 4e-5; phi, by exp2, adds less than 1e-6.
    """
    y = x
    if ACT == "gelu":
        if EXACT:
            cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        else:
            cdf = _phi_poly(x)
        # 0.7213... = log2(e) / 2; phi(x) = exp(-x^2 / 2) / sqrt(2 pi)
        d = d * (cdf + x * (0.3989422804014327 * tl.math.exp2(x * x * -0.7213475204444817)))
        y = x * cdf
    elif ACT == "gelu_tanh":
        s, slope = _sigmoid_and_slope(1.5957691216057308 * (x + 0.044715 * x * x * x), EXACT)
        y = x * s
        d = d * (s + x * slope * (1.5957691216057308 + 0.21406444881780073 * (x * x)))
    elif ACT == "relu":
        y = tl.where(x > 0, x, tl.where(x == x, 0.0, x))
        d = tl.where(x <= 0, 0.0, d)
    elif ACT == "silu":
        s, slope = _sigmoid_and_slope(x, EXACT)
        y = x * s
        d = d * (s + x * slope)
    return d, y


@triton.jit
def tanh(x):
    """tanh in fp32: Cephes' odd polynomial below 0.625, else from exp2; relative error about 2e-7."""
    z = x * x
    poly = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
    small = x + x * z * (poly - 3.33332819422e-1)
    e = tl.math.exp2(tl.abs(x) * -2.8853900817779268)
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))
