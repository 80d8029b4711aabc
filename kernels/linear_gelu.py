"""linear_gelu: y = act(x @ weight^T + bias), bias and activation in the GEMM's epilogue (BertIntermediate).
linear_gelu_pre: the same for training, from one launch with the pre-activation, which the backward reads.

act is one of activation.TORCH: "gelu" (erf), "gelu_tanh", "relu", "silu". The product runs in kernels/gemm.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bert_fast.kernels.activation import TORCH, check_activation
from bert_fast.kernels.gemm import check_linear, gemm_triton
from bert_fast.kernels.grad_activation import grad_activation, grad_activation_ref
from bert_fast.kernels.linear import Products, linear_ref, product, product_gradients, product_gradients_ref
from bert_fast.kernels.registry import Grads, register

Pair = tuple[torch.Tensor, torch.Tensor]


def linear_gelu_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, n_rows: torch.Tensor | None, act: str
) -> torch.Tensor:
    """x (T, K), weight (N, K), bias (N,) or None, n_rows int32 (1,) or None (all T)."""
    return TORCH[act](linear_ref(x, weight, bias, n_rows))


def linear_gelu_cpu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, n_rows: torch.Tensor | None, act: str
) -> torch.Tensor:
    check_activation(act)
    check_linear("linear_gelu", x, [weight], [bias])
    y = product(x, weight, bias, n_rows)
    rows = y if n_rows is None else y[: int(n_rows.item())]
    if act in ("gelu", "gelu_tanh"):  # in place: one buffer of T x N is the largest of the layer
        torch.ops.aten.gelu_(rows, approximate="none" if act == "gelu" else "tanh")
    elif act in ("relu", "silu"):
        getattr(F, act)(rows, inplace=True)
    return y


def linear_gelu_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, n_rows: torch.Tensor | None, act: str
) -> torch.Tensor:
    check_activation(act)
    check_linear("linear_gelu", x, [weight], [bias])
    return gemm_triton(x, [weight], [bias], n_rows, act)


def _linear_gelu_cuda(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, n_rows: torch.Tensor | None, act: str
) -> torch.Tensor:
    if x.dtype == torch.float32:  # as in linear: torch's own GEMM, all T rows
        return linear_gelu_cpu(x, weight, bias, None, act)
    return linear_gelu_triton(x, weight, bias, n_rows, act)


def _linear_gelu_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, n_rows: torch.Tensor | None, act: str
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


linear_gelu = register(
    "linear_gelu(Tensor x, Tensor weight, Tensor? bias, Tensor? n_rows, str act) -> Tensor",
    ref=linear_gelu_ref,
    cpu=linear_gelu_cpu,
    cuda=_linear_gelu_cuda,
    fake=_linear_gelu_fake,
)


def linear_gelu_pre_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, n_rows: torch.Tensor | None, act: str
) -> Pair:
    """The arguments of linear_gelu_ref; returns (y, pre), y = act(pre) of the pre-activation as it is returned."""
    pre = linear_ref(x, weight, bias, n_rows)
    return TORCH[act](pre).clone(), pre  # clone: "none" returns its argument


def linear_gelu_pre_cpu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, n_rows: torch.Tensor | None, act: str
) -> Pair:
    check_activation(act)
    check_linear("linear_gelu_pre", x, [weight], [bias])
    pre = product(x, weight, bias, n_rows)
    y = TORCH[act](pre)
    return y.clone() if y is pre else y, pre


def linear_gelu_pre_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, n_rows: torch.Tensor | None, act: str
) -> Pair:
    check_activation(act)
    check_linear("linear_gelu_pre", x, [weight], [bias])
    pre = x.new_empty(x.shape[0], weight.shape[0])
    return gemm_triton(x, [weight], [bias], n_rows, act, pre=pre), pre


def _linear_gelu_pre_cuda(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, n_rows: torch.Tensor | None, act: str
) -> Pair:
    if x.dtype == torch.float32:  # as in linear: torch's own GEMM, all T rows
        return linear_gelu_pre_cpu(x, weight, bias, None, act)
    return linear_gelu_pre_triton(x, weight, bias, n_rows, act)


def _linear_gelu_pre_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, n_rows: torch.Tensor | None, act: str
) -> Pair:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], weight.shape[0])


def _gradient(
    activation: Callable[..., torch.Tensor], products: Products, needs: Sequence[bool],
    inputs: Sequence[Any], outputs: Sequence[Any], grads: Sequence[torch.Tensor | None],
) -> Grads:  # fmt: skip
    (x, weight, _, n_rows, act), (_, pre), (dy, d_pre) = inputs, outputs, grads
    if dy is not None:
        through = activation(dy, pre, act, n_rows)
        d_pre = through if d_pre is None else through + d_pre
    assert d_pre is not None
    return (*products(needs[:3], d_pre, x, [weight], n_rows), None, None)


linear_gelu_pre = register(
    "linear_gelu_pre(Tensor x, Tensor weight, Tensor? bias, Tensor? n_rows, str act) -> (Tensor, Tensor)",
    ref=linear_gelu_pre_ref,
    cpu=linear_gelu_pre_cpu,
    cuda=_linear_gelu_pre_cuda,
    fake=_linear_gelu_pre_fake,
    gradient=partial(_gradient, grad_activation, product_gradients),
    gradient_ref=partial(_gradient, grad_activation_ref, product_gradients_ref),
    reads={"x": "weight", "weight": "x", "bias": ""},
    saved_outputs=(1,),
)
