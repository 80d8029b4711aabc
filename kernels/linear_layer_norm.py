"""linear_layer_norm: LayerNorm(x @ weight^T + bias + residual) on packed rows (BertSelfOutput, BertOutput).

Two launches: the product of kernels/gemm.py and the pass of kernels/residual_layer_norm.py. Where rows are few, the
product's inner dimension is split over several programs, or the 768 columns of a base model would keep a third of the
chip busy; the LayerNorm then adds the parts, the bias and the residual, all in fp32, so that splitting costs no launch.

Adding the residual in the product's epilogue would move the same bytes (the residual read once, the sum written and
read once), but where nothing hides them; it pays only where the LayerNorm pass goes away with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bert_fast.kernels.configs import TileConfig
from bert_fast.kernels.gemm import check_linear, gemm_triton
from bert_fast.kernels.linear import linear_ref, product
from bert_fast.kernels.registry import register
from bert_fast.kernels.residual_layer_norm import (
    Pair,
    add_and_norm,
    check,
    launch,
    residual_layer_norm_ref,
)


def linear_layer_norm_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor,
    norm_bias: torch.Tensor, eps: float, token: torch.Tensor | None, n_rows: torch.Tensor | None, want_rows: bool,
    want_padded: bool,
) -> Pair:  # fmt: skip
    """x (T, K), weight (N, K), bias (N,), residual (T, N), norm_weight and norm_bias (N,); the rest, and the outputs,
    as residual_layer_norm's.
    """
    y = linear_ref(x, weight, bias, n_rows)
    return residual_layer_norm_ref(
        y, residual, norm_weight, norm_bias, eps, token, n_rows, want_rows, want_padded
    )  # fmt: skip


def _check(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
) -> None:  # fmt: skip
    check_linear("linear_layer_norm", x, [weight], [bias])
    shape = (x.shape[0], weight.shape[0])
    if residual.dtype != x.dtype or residual.device != x.device or residual.shape != shape:
        raise ValueError(
            f"linear_layer_norm: residual is {tuple(residual.shape)} {residual.dtype} on {residual.device}, expected "
            f"{shape} {x.dtype} on {x.device}"
        )
    check("linear_layer_norm", residual, residual, norm_weight, norm_bias)


def linear_layer_norm_cpu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor,
    norm_bias: torch.Tensor, eps: float, token: torch.Tensor | None, n_rows: torch.Tensor | None, want_rows: bool,
    want_padded: bool,
) -> Pair:  # fmt: skip
    _check(x, weight, bias, residual, norm_weight, norm_bias)
    y = product(x, weight, bias, n_rows)
    return add_and_norm(y, residual, norm_weight, norm_bias, eps, token, n_rows, want_rows, want_padded)


def linear_layer_norm_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor,
    norm_bias: torch.Tensor, eps: float, token: torch.Tensor | None, n_rows: torch.Tensor | None, want_rows: bool,
    want_padded: bool, config: TileConfig | None = None,
) -> Pair:  # fmt: skip
    _check(x, weight, bias, residual, norm_weight, norm_bias)
    y = gemm_triton(x, [weight], [bias], n_rows, "none", config, may_split=True)
    left = bias.contiguous() if y.dim() == 3 else None
    return launch(y, left, residual, norm_weight, norm_bias, eps, token, n_rows, want_rows, want_padded)


def _linear_layer_norm_cuda(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor,
    norm_bias: torch.Tensor, eps: float, token: torch.Tensor | None, n_rows: torch.Tensor | None, want_rows: bool,
    want_padded: bool,
) -> Pair:  # fmt: skip
    if x.dtype == torch.float32:  # as in linear: torch's own GEMM, all T rows
        _check(x, weight, bias, residual, norm_weight, norm_bias)
        y = F.linear(x, weight, bias)
        return launch(y, None, residual, norm_weight, norm_bias, eps, token, n_rows, want_rows, want_padded)
    return linear_layer_norm_triton(
        x, weight, bias, residual, norm_weight, norm_bias, eps, token, n_rows, want_rows, want_padded
    )  # fmt: skip


def _linear_layer_norm_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor,
    norm_bias: torch.Tensor, eps: float, token: torch.Tensor | None, n_rows: torch.Tensor | None, want_rows: bool,
    want_padded: bool,
) -> Pair:  # fmt: skip
    shape = residual.shape
    return x.new_empty(shape if want_rows else 0), x.new_empty(shape if want_padded else 0)


linear_layer_norm = register(
    "linear_layer_norm(Tensor x, Tensor weight, Tensor bias, Tensor residual, Tensor norm_weight, Tensor norm_bias,"
    " float eps, Tensor? token, Tensor? n_rows, bool want_rows, bool want_padded) -> (Tensor, Tensor)",
    ref=linear_layer_norm_ref,
    cpu=linear_layer_norm_cpu,
    cuda=_linear_layer_norm_cuda,
    fake=_linear_layer_norm_fake,
)
