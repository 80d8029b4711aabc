"""fold_vectors: u = W @ gamma and c = W @ beta + b, what a linear needs of a LayerNorm that is folded into it.

W @ LayerNorm(h) + b = rstd * (W @ (h * gamma) - mean * u) + c; the whole scheme is in kernels/linear_to_stream.py.
Computed anew in every forward: the weights are read where they lie, and nothing can go stale.

Bytes: PARTS * N * K read once, 8 * PARTS * N written; FLOP: 4 * PARTS * N * K. Bandwidth-bound, and it leaves the
weights in L2 for the product that follows.
"""

from __future__ import annotations

import torch

from bert_fast.kernels.gemm import _of_part, check_linear
from bert_fast.kernels.linear_to_stream import check_vector, sum_dtype
from bert_fast.kernels.registry import register
from bert_fast.kernels.runtime import ceil_div, device_guard, follow_previous, launch_options, tl, triton

Tensor = torch.Tensor
# 8 rows of 256 columns a step: 32 bytes a thread from each row, and 288 programs for the projections of a base model
BLOCK_N, BLOCK_K, NUM_WARPS = 8, 256, 4


def parts_of(*optional: Tensor | None) -> list[Tensor]:
    """The one or three tensors of a linear's parts."""
    return [t for t in optional if t is not None]


def fold_vectors_ref(
    w0: Tensor, w1: Tensor | None, w2: Tensor | None, b0: Tensor, b1: Tensor | None, b2: Tensor | None, gamma: Tensor,
    beta: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One or three weights (N, K) with biases (N,); gamma, beta (K,). Returns u, c (parts * N,), fp32."""
    dtype = sum_dtype(gamma)
    weight, bias = (torch.cat(parts_of(*ts)).to(dtype) for ts in ((w0, w1, w2), (b0, b1, b2)))
    return weight @ gamma.to(dtype), weight @ beta.to(dtype) + bias


@triton.jit
def _fold_vectors_kernel(
    w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, gamma_ptr, beta_ptr, u_ptr, c_ptr, N, K,
    PARTS: tl.constexpr, PDL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows of one part's weight."""
    follow_previous(PDL)
    part = tl.program_id(1)
    w_ptr = _of_part(part, w0_ptr, w1_ptr, w2_ptr, PARTS)
    bias_ptr = _of_part(part, b0_ptr, b1_ptr, b2_ptr, PARTS)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    u = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    c = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in range(0, K, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        inside = (rows < N)[:, None] & (cols < K)[None, :]
        w = tl.load(w_ptr + rows.to(tl.int64)[:, None] * K + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        u += w * tl.load(gamma_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)[None, :]
        c += w * tl.load(beta_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(u_ptr + part * N + rows, tl.sum(u, 1), mask=rows < N)
    tl.store(c_ptr + part * N + rows, tl.sum(c, 1) + bias, mask=rows < N)


def _check(weights: list[Tensor], biases: list[Tensor], gamma: Tensor, beta: Tensor) -> None:
    if len(weights) not in (1, 3) or len(biases) != len(weights):
        raise ValueError(f"fold_vectors: {len(weights)} weights, {len(biases)} biases, expected one or three of both")
    check_linear("fold_vectors", gamma.contiguous()[None], weights, list(biases))
    check_vector("fold_vectors", "beta", beta, gamma.shape[0], gamma)


def fold_vectors_cpu(
    w0: Tensor, w1: Tensor | None, w2: Tensor | None, b0: Tensor, b1: Tensor | None, b2: Tensor | None, gamma: Tensor,
    beta: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(parts_of(w0, w1, w2), parts_of(b0, b1, b2), gamma, beta)
    return fold_vectors_ref(w0, w1, w2, b0, b1, b2, gamma, beta)


def fold_vectors_triton(
    w0: Tensor, w1: Tensor | None, w2: Tensor | None, b0: Tensor, b1: Tensor | None, b2: Tensor | None, gamma: Tensor,
    beta: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    weights, biases = parts_of(w0, w1, w2), parts_of(b0, b1, b2)
    _check(weights, biases, gamma, beta)
    u, c = _fold_vectors_fake(w0, w1, w2, b0, b1, b2, gamma, beta)
    (N, K), absent = w0.shape, [None] * (3 - len(weights))
    with device_guard(gamma):
        _fold_vectors_kernel[ceil_div(N, BLOCK_N), len(weights)](
            *(w.contiguous() for w in weights), *absent, *(b.contiguous() for b in biases), *absent,
            gamma.contiguous(), beta.contiguous(), u, c, N, K,
            PARTS=len(weights), BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=NUM_WARPS, **launch_options(),
        )  # fmt: skip
    return u, c


def _fold_vectors_fake(
    w0: Tensor, w1: Tensor | None, w2: Tensor | None, b0: Tensor, b1: Tensor | None, b2: Tensor | None, gamma: Tensor,
    beta: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    size, dtype = len(parts_of(w0, w1, w2)) * w0.shape[0], sum_dtype(gamma)
    return gamma.new_empty(size, dtype=dtype), gamma.new_empty(size, dtype=dtype)


fold_vectors = register(
    "fold_vectors(Tensor w0, Tensor? w1, Tensor? w2, Tensor b0, Tensor? b1, Tensor? b2, Tensor gamma, Tensor beta)"
    " -> (Tensor, Tensor)",
    ref=fold_vectors_ref,
    cpu=fold_vectors_cpu,
    cuda=fold_vectors_triton,
    fake=_fold_vectors_fake,
)
