"""qkv_linear: the three projections of self-attention in one launch, each parameter read where it lies.

y (T, 3 * N) = [x @ Wq^T + bq | x @ Wk^T + bk | x @ Wv^T + bv]; without Wq the last two, (T, 2 * N), for a layer of
which only the first tokens are queries. The product runs in kernels/gemm.py.
Source of the operation: transformers BertSelfAttention.forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bert_fast.kernels.gemm import check_linear, gemm_triton, used_rows
from bert_fast.kernels.linear import Products, linear_into, linear_ref, product_gradients, product_gradients_ref
from bert_fast.kernels.registry import Grads, register

Bias = torch.Tensor | None


def _parts(
    wq: torch.Tensor | None, wk: torch.Tensor, wv: torch.Tensor, bq: Bias, bk: Bias, bv: Bias
) -> tuple[list[torch.Tensor], list[Bias]]:
    return ([wk, wv], [bk, bv]) if wq is None else ([wq, wk, wv], [bq, bk, bv])


def qkv_linear_ref(
    x: torch.Tensor, wq: torch.Tensor | None, wk: torch.Tensor, wv: torch.Tensor, bq: Bias, bk: Bias, bv: Bias,
    n_rows: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """x (T, K); each weight (N, K), wq or None; each bias (N,) or all None; n_rows int32 (1,) or None (all T)."""
    weights, biases = _parts(wq, wk, wv, bq, bk, bv)
    return torch.cat([linear_ref(x, w, b, n_rows) for w, b in zip(weights, biases, strict=True)], dim=1)


def qkv_linear_cpu(
    x: torch.Tensor, wq: torch.Tensor | None, wk: torch.Tensor, wv: torch.Tensor, bq: Bias, bk: Bias, bv: Bias,
    n_rows: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    weights, biases = _parts(wq, wk, wv, bq, bk, bv)
    check_linear("qkv_linear", x, weights, biases)
    rows, N = used_rows(x, n_rows), wk.shape[0]
    y = x.new_empty(x.shape[0], len(weights) * N)
    for part, (w, b) in enumerate(zip(weights, biases, strict=True)):
        linear_into(y[:rows, part * N : (part + 1) * N], x[:rows], w, b)
    return y


def qkv_linear_triton(
    x: torch.Tensor, wq: torch.Tensor | None, wk: torch.Tensor, wv: torch.Tensor, bq: Bias, bk: Bias, bv: Bias,
    n_rows: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    weights, biases = _parts(wq, wk, wv, bq, bk, bv)
    check_linear("qkv_linear", x, weights, biases)
    return gemm_triton(x, weights, biases, n_rows, "none")


def _qkv_linear_cuda(
    x: torch.Tensor, wq: torch.Tensor | None, wk: torch.Tensor, wv: torch.Tensor, bq: Bias, bk: Bias, bv: Bias,
    n_rows: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    if x.dtype == torch.float32:  # as in linear: torch's own GEMM, all T rows
        return qkv_linear_cpu(x, wq, wk, wv, bq, bk, bv, None)
    return qkv_linear_triton(x, wq, wk, wv, bq, bk, bv, n_rows)


def _qkv_linear_fake(
    x: torch.Tensor, wq: torch.Tensor | None, wk: torch.Tensor, wv: torch.Tensor, bq: Bias, bk: Bias, bv: Bias,
    n_rows: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], (2 if wq is None else 3) * wk.shape[0])


def _gradient(
    products: Products, needs: Sequence[bool], inputs: Sequence[Any], outputs: Sequence[Any],
    grads: Sequence[torch.Tensor | None],
) -> Grads:  # fmt: skip
    (x, wq, wk, wv, *_, n_rows), (dy,) = inputs, grads
    assert dy is not None
    if wq is None:
        dx, dk, dv, dbk, dbv = products([needs[i] for i in (0, 2, 3, 5, 6)], dy, x, [wk, wv], n_rows)
        return dx, None, dk, dv, None, dbk, dbv, None
    return (*products(needs[:7], dy, x, [wq, wk, wv], n_rows), None)


qkv_linear = register(
    "qkv_linear(Tensor x, Tensor? wq, Tensor wk, Tensor wv, Tensor? bq, Tensor? bk, Tensor? bv, Tensor? n_rows)"
    " -> Tensor",
    ref=qkv_linear_ref,
    cpu=qkv_linear_cpu,
    cuda=_qkv_linear_cuda,
    fake=_qkv_linear_fake,
    gradient=partial(_gradient, product_gradients),
    gradient_ref=partial(_gradient, product_gradients_ref),
    reads={"x": "wq wk wv", "wq": "x", "wk": "x", "wv": "x", "bq": "", "bk": "", "bv": ""},
)
