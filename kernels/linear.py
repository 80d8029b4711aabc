"""linear: y = x @ weight^T + bias on packed rows (the output projections and the masked-LM dense).

The product runs in kernels/gemm.py. fp32 on a GPU goes to torch's own GEMM, which honours torch's precision flags.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bert_fast.kernels.gemm import check_linear, gemm_triton
from bert_fast.kernels.registry import register


def used_rows(x: torch.Tensor, n_rows: torch.Tensor | None) -> int:
    """Rows in use, on the host. Free on CPU; on CUDA it would synchronise, so only references call it there."""
    return x.shape[0] if n_rows is None else int(n_rows.item())


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


linear = register(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? n_rows) -> Tensor",
    ref=linear_ref,
    cpu=linear_cpu,
    cuda=_linear_cuda,
    fake=_linear_fake,
)
