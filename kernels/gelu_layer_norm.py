"""gelu_layer_norm: LayerNorm(act(x)) in one pass, the masked-LM head's transform after its dense.

Statistics in fp32. Bytes: T * N read, T * N written; bandwidth-bound.
Source of the operation: transformers BertPredictionHeadTransform.forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from bert_fast.kernels.activation import TORCH, activate, check_activation
from bert_fast.kernels.gelu_layer_norm_backward import gelu_layer_norm_backward
from bert_fast.kernels.registry import Grads, register
from bert_fast.kernels.residual_layer_norm import _layer_norm, check_layer_norm, num_warps
from bert_fast.kernels.runtime import device_guard, follow_previous, launch_options, next_power_of_2, tl, triton


def gelu_layer_norm_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, act: str
) -> torch.Tensor:
    """x (T, N), weight and bias (N,), act one of activation.TORCH; returns (T, N)."""
    return F.layer_norm(TORCH[act](x), (x.shape[1],), weight, bias, eps)


@triton.jit
def _gelu_layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, stride_x, N, eps,
    ACT: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    follow_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + row * stride_x + cols, mask=cols < N, other=0.0).to(tl.float32)
    # exact: LayerNorm would magnify the polynomial's error in a row of little variance, and erf hides behind the memory
    h = activate(x, ACT, True)  # every activation maps the padding zeros to zero
    y = _layer_norm(h, weight_ptr, bias_ptr, cols, N, eps)
    tl.store(y_ptr + row * N + cols, y.to(y_ptr.dtype.element_ty), mask=cols < N)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, act: str) -> None:
    check_activation(act)
    check_layer_norm("gelu_layer_norm", x, weight, bias)


def gelu_layer_norm_cpu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, act: str
) -> torch.Tensor:
    _check(x, weight, bias, act)
    return gelu_layer_norm_ref(x, weight, bias, eps, act)


def gelu_layer_norm_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, act: str
) -> torch.Tensor:
    _check(x, weight, bias, act)
    T, N = x.shape
    y = x.new_empty(T, N)
    BLOCK_N = next_power_of_2(N)
    if T:
        with device_guard(x):
            _gelu_layer_norm_kernel[(T,)](
                x, weight.contiguous(), bias.contiguous(), y, x.stride(0), N, eps, ACT=act, BLOCK_N=BLOCK_N,
                num_warps=num_warps(BLOCK_N), **launch_options(),
            )  # fmt: skip
    return y


def _gelu_layer_norm_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, act: str
) -> torch.Tensor:
    return x.new_empty(x.shape)


def _gradient(
    needs: Sequence[bool], inputs: Sequence[Any], outputs: Sequence[Any], grads: Sequence[torch.Tensor | None]
) -> Grads:
    x, weight, _, eps, act = inputs
    found = gelu_layer_norm_backward(grads[0], x, weight, eps, act)
    return (*(g if need else None for g, need in zip(found, needs, strict=False)), None, None)


gelu_layer_norm = register(
    "gelu_layer_norm(Tensor x, Tensor weight, Tensor bias, float eps, str act) -> Tensor",
    ref=gelu_layer_norm_ref,
    cpu=gelu_layer_norm_cpu,
    cuda=gelu_layer_norm_triton,
    fake=_gelu_layer_norm_fake,
    gradient=_gradient,
)
