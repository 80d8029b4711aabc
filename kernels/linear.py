"""linear: y = x @ weight^T + bias on packed rows (the output projections and the masked-LM dense).

The product runs in kernels/gemm.py. fp32 on a GPU goes to torch's own GEMM, which honours torch's precision flags.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bert_fast.kernels.column_sums import column_sums
from bert_fast.kernels.gemm import check_linear, gemm_triton, used_rows
from bert_fast.kernels.grad_input import grad_input
from bert_fast.kernels.grad_weight import grad_weight
from bert_fast.kernels.registry import Grads, register

Products = Callable[..., list[torch.Tensor | None]]  # product_gradients, or the same of plain operators


def linear_ref(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, n_rows: torch.Tensor | None
) -> torch.Tensor:
    """x (T, K), weight (N, K), bias (N,) or None, n_rows int32 (1,) or None (all T). Rows past n_rows come out zero."""
    rows = used_rows(x, n_rows)
    return F.pad(F.linear(x[:rows], weight, bias), (0, 0, 0, x.shape[0] - rows))


def linear_into(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """out (T, N) = x @ weight^T + bias without a temporary."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def linear_cpu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, n_rows: torch.Tensor | None
) -> torch.Tensor:
    check_linear("linear", x, [weight], [bias])
    return product(x, weight, bias, n_rows)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, n_rows: torch.Tensor | None
) -> torch.Tensor:
    """The CPU body on checked arguments."""
    rows = used_rows(x, n_rows)
    if rows == x.shape[0]:
        return F.linear(x, weight, bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    linear_into(y[:rows], x[:rows], weight, bias)
    return y


def linear_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, n_rows: torch.Tensor | None
) -> torch.Tensor:
    check_linear("linear", x, [weight], [bias])
    return gemm_triton(x, [weight], [bias], n_rows, "none")


def _linear_cuda(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, n_rows: torch.Tensor | None
) -> torch.Tensor:
    if x.dtype == torch.float32:
        check_linear("linear", x, [weight], [bias])
        return F.linear(x, weight, bias)
    return linear_triton(x, weight, bias, n_rows)


def _linear_fake(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, n_rows: torch.Tensor | None
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def product_gradients(
    needs: Sequence[bool], dy: torch.Tensor, x: torch.Tensor, weights: Sequence[torch.Tensor],
    n_rows: torch.Tensor | None, add: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:  # fmt: skip
    """Gradients of x, the weights and the biases of products side by side; needs: of these, in this order.

    x is read where a weight's gradient is needed, the weights where that of x is. add: another gradient of x, summed in
    the same launch.
    """
    parts = len(weights)
    N = dy.shape[1] // parts
    want = needs[1 : 1 + parts], needs[1 + parts :]
    wanted = [i for i in range(parts) if want[0][i] or want[1][i]]
    d_weights: list[torch.Tensor | None] = [None] * parts
    d_biases: list[torch.Tensor | None] = [None] * parts
    if wanted:
        first, end = wanted[0], wanted[-1] + 1  # a part in between that nobody needs is rare and not worth a launch
        columns = dy[:, first * N : end * N]
        if any(want[0]):
            dw, db = grad_weight(columns, x, n_rows, any(want[1]))
            d_weights[first:end] = dw.split(N)
        else:
            db = column_sums(columns, n_rows)
        if any(want[1]):
            d_biases[first:end] = db.split(N)
    dx = grad_input(dy, *weights, *[None] * (3 - parts), add, n_rows) if needs[0] else None
    return [g if need else None for g, need in zip((dx, *d_weights, *d_biases), needs, strict=True)]


def product_gradients_ref(
    needs: Sequence[bool], dy: torch.Tensor, x: torch.Tensor, weights: Sequence[torch.Tensor],
    n_rows: torch.Tensor | None,
) -> list[torch.Tensor | None]:  # fmt: skip
    """The same of plain operators; of rows past n_rows x gets zeros."""
    T, parts, n = dy.shape[0], len(weights), used_rows(dy, n_rows)
    d_parts = dy[:n].split(dy.shape[1] // parts, 1)
    dx = None
    if needs[0]:
        dx = sum(d @ w for d, w in zip(d_parts, weights, strict=True))
        dx = F.pad(dx, (0, 0, 0, T - n)) if n < T else dx
    d_weights = [d.t() @ x[:n] if need else None for d, need in zip(d_parts, needs[1 : 1 + parts], strict=True)]
    d_biases = [d.sum(0) if need else None for d, need in zip(d_parts, needs[1 + parts :], strict=True)]
    return [dx, *d_weights, *d_biases]


def _gradient(
    products: Products, needs: Sequence[bool], inputs: Sequence[Any], outputs: Sequence[Any],
    grads: Sequence[torch.Tensor | None],
) -> Grads:  # fmt: skip
    (x, weight, _, n_rows), (dy,) = inputs, grads
    assert dy is not None
    return (*products(needs[:3], dy, x, [weight], n_rows), None)


linear = register(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? n_rows) -> Tensor",
    ref=linear_ref,
    cpu=linear_cpu,
    cuda=_linear_cuda,
    fake=_linear_fake,
    gradient=partial(_gradient, product_gradients),
    gradient_ref=partial(_gradient, product_gradients_ref),
    reads={"x": "weight", "weight": "x", "bias": ""},
)
