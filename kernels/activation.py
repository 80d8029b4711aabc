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


def check_activation(act: str) -> None:
    if act not in TORCH:
        raise ValueError(f"act={act!r}: expected one of {sorted(TORCH)}")


@triton.jit
def _sigmoid(x):
    # exp2 of a large positive argument is inf and 1 / inf is the right limit, 0
    return 1.0 / (1.0 + tl.math.exp2(x * -1.4426950408889634))


@triton.jit
def _half_erfc_abs(x):
    # Phi(-|x|) by Abramowitz & Stegun 7.1.26; absolute error of erf <= 1.5e-7, no special function but exp2.
    z = tl.abs(x) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.3275911 * z)
    poly = ((((1.061405429 * t - 1.453152027) * t) + 1.421413741) * t - 0.284496736) * t + 0.254829592
    return 0.5 * poly * t * tl.math.exp2(z * z * -1.4426950408889634)


@triton.jit
def activate(x, ACT: tl.constexpr, EXACT: tl.constexpr):
    """fp32 in, fp32 out. EXACT: the library erf (fp32 outputs); else the rational one (half outputs)."""
    if ACT == "gelu":
        if EXACT:
            x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
        else:
            tail = x * _half_erfc_abs(x)
            x = tl.where(x >= 0, x - tail, tail)
    elif ACT == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) == sigmoid(2 u)
        x = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACT == "relu":
        x = tl.where(x > 0, x, tl.where(x == x, 0.0, x))  # NaN stays NaN, as in torch
    elif ACT == "silu":
        x = x * _sigmoid(x)
    return x


@triton.jit
def tanh(x):
    """tanh in fp32: Cephes' odd polynomial below 0.625, else from exp2; relative error about 2e-7."""
    z = x * x
    poly = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
    small = x + x * z * (poly - 3.33332819422e-1)
    e = tl.math.exp2(tl.abs(x) * -2.8853900817779268)
    large = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))
