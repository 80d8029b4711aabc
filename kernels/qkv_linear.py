"""qkv_linear: the three projections of self-attention in one launch, each parameter read where it lies.

y (T, 3 * N) = [x @ Wq^T + bq | x @ Wk^T + bk | x @ Wv^T + bv]. The product runs in kernels/gemm.py.
Source of the operation: transformers BertSelfAttention.forward.
"""

from __future__ import annotations

import torch

from bert_fast.kernels.gemm import check_linear, gemm_triton
from bert_fast.kernels.linear import linear_into, linear_ref, used_rows
from bert_fast.kernels.registry import register

Bias = torch.Tensor | None


def qkv_linear_ref(
    x: torch.Tensor, wq: torch.Tensor, wk: torch.Tensor, wv: torch.Tensor, bq: Bias, bk: Bias, bv: Bias,
    n_rows: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """x (T, K); each weight (N, K), each bias (N,) or all None; n_rows int32 (1,) or None (all T)."""
    return torch.cat([linear_ref(x, w, b, n_rows) for w, b in ((wq, bq), (wk, bk), (wv, bv))], dim=1)


def qkv_linear_cpu(
    x: torch.Tensor, wq: torch.Tensor, wk: torch.Tensor, wv: torch.Tensor, bq: Bias, bk: Bias, bv: Bias,
    n_rows: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    check_linear("qkv_linear", x, [wq, wk, wv], [bq, bk, bv])
    rows, N = used_rows(x, n_rows), wq.shape[0]
    y = x.new_empty(x.shape[0], 3 * N)
    for part, (w, b) in enumerate(((wq, bq), (wk, bk), (wv, bv))):
        linear_into(y[:rows, part * N : (part + 1) * N], x[:rows], w, b)
    return y


def qkv_linear_triton(
    x: torch.Tensor, wq: torch.Tensor, wk: torch.Tensor, wv: torch.Tensor, bq: Bias, bk: Bias, bv: Bias,
    n_rows: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    check_linear("qkv_linear", x, [wq, wk, wv], [bq, bk, bv])
    return gemm_triton(x, [wq, wk, wv], [bq, bk, bv], n_rows, "none")


def _qkv_linear_cuda(
    x: torch.Tensor, wq: torch.Tensor, wk: torch.Tensor, wv: torch.Tensor, bq: Bias, bk: Bias, bv: Bias,
    n_rows: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    if x.dtype == torch.float32:  # as in linear: torch's own GEMM, all T rows
        return qkv_linear_cpu(x, wq, wk, wv, bq, bk, bv, None)
    return qkv_linear_triton(x, wq, wk, wv, bq, bk, bv, n_rows)


def _qkv_linear_fake(
    x: torch.Tensor, wq: torch.Tensor, wk: torch.Tensor, wv: torch.Tensor, bq: Bias, bk: Bias, bv: Bias,
    n_rows: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], 3 * wq.shape[0])


qkv_linear = register(
    "qkv_linear(Tensor x, Tensor wq, Tensor wk, Tensor wv, Tensor? bq, Tensor? bk, Tensor? bv, Tensor? n_rows)"
    " -> Tensor",
    ref=qkv_linear_ref,
    cpu=qkv_linear_cpu,
    cuda=_qkv_linear_cuda,
    fake=_qkv_linear_fake,
)
