"""normalise: LayerNorm(h) from the stream of h, where the rows themselves are wanted (kernels/linear_to_stream.py).

y = rstd * (g - mean * gamma) + beta; the last layer, a hidden state that leaves the model, a first-token layer's input.
The outputs are those of kernels/residual_layer_norm.py. Bytes: T * N read, T * N written for each output asked for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bert_fast.kernels.linear import used_rows
from bert_fast.kernels.linear_to_stream import check_stream, normalised_ref, row_statistics
from bert_fast.kernels.registry import register
from bert_fast.kernels.residual_layer_norm import (
    Pair,
    _store,
    _store_dropped,
    check_layer_norm,
    num_warps,
    to_padded,
)
from bert_fast.kernels.runtime import device_guard, follow_previous, launch_options, next_power_of_2, tl, triton

Tensor = torch.Tensor


def normalise_ref(
    g: Tensor, sums: Tensor, gamma: Tensor, beta: Tensor, eps: float, token: Tensor | None, n_rows: Tensor | None,
    want_rows: bool, want_padded: bool,
) -> Pair:  # fmt: skip
    """g (T, N) and sums: a stream; gamma, beta (N,) and eps of its LayerNorm; token int32 (T,) for the padded output;
    n_rows int32 (1,) or None (all T).

    Returns (rows (T, N), padded (T, N)), empty where not wanted.
    """
    n = used_rows(g, n_rows)
    y = normalised_ref(g[:n], sums[..., :n], gamma, beta, eps).to(g.dtype)
    rows = F.pad(y, (0, 0, 0, g.shape[0] - n)) if want_rows else g.new_empty(0)
    return rows, to_padded(y, token, n) if want_padded else g.new_empty(0)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["n_rows_ptr"])
def _normalise_kernel(
    g_ptr, sums_ptr, gamma_ptr, beta_ptr, rows_ptr, padded_ptr, token_ptr, n_rows_ptr, stride_g, T, N, eps,
    HAS_N_ROWS: tl.constexpr, WANT_ROWS: tl.constexpr, WANT_PADDED: tl.constexpr, PARTIALS: tl.constexpr,
    PDL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    follow_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    live = True
    if HAS_N_ROWS:
        live = row < tl.load(n_rows_ptr)
    if live:
        mean, rstd = row_statistics(sums_ptr, row, T, N, eps, PARTIALS)
        g = tl.load(g_ptr + row * stride_g + cols, mask=cols < N, other=0.0).to(tl.float32)
        gamma = tl.load(gamma_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        y = rstd * (g - mean * gamma) + beta
        _store(y, rows_ptr, padded_ptr, token_ptr, row, cols, N, WANT_ROWS, WANT_PADDED)
    else:
        _store_dropped(padded_ptr, token_ptr, row, cols, N, WANT_PADDED)


def _check(g: Tensor, sums: Tensor, gamma: Tensor, beta: Tensor, token: Tensor | None, want_padded: bool) -> None:
    check_stream("normalise", g, sums)
    check_layer_norm("normalise", g, gamma, beta)
    if want_padded and token is None:
        raise ValueError("padded output asked for without a token map")


def normalise_cpu(
    g: Tensor, sums: Tensor, gamma: Tensor, beta: Tensor, eps: float, token: Tensor | None, n_rows: Tensor | None,
    want_rows: bool, want_padded: bool,
) -> Pair:  # fmt: skip
    _check(g, sums, gamma, beta, token, want_padded)
    return normalise_ref(g, sums, gamma, beta, eps, token, n_rows, want_rows, want_padded)


def normalise_triton(
    g: Tensor, sums: Tensor, gamma: Tensor, beta: Tensor, eps: float, token: Tensor | None, n_rows: Tensor | None,
    want_rows: bool, want_padded: bool,
) -> Pair:  # fmt: skip
    _check(g, sums, gamma, beta, token, want_padded)
    rows, padded = _normalise_fake(g, sums, gamma, beta, eps, token, n_rows, want_rows, want_padded)
    T, N = g.shape
    BLOCK_N = next_power_of_2(N)
    if T:
        with device_guard(g):
            _normalise_kernel[(T,)](
                g, sums, gamma.contiguous(), beta.contiguous(), rows, padded, token, n_rows, g.stride(0), T, N, eps,
                HAS_N_ROWS=n_rows is not None, WANT_ROWS=want_rows, WANT_PADDED=want_padded, PARTIALS=sums.shape[1],
                BLOCK_N=BLOCK_N, num_warps=num_warps(BLOCK_N), **launch_options(),
            )  # fmt: skip
    return rows, padded


def _normalise_fake(
    g: Tensor, sums: Tensor, gamma: Tensor, beta: Tensor, eps: float, token: Tensor | None, n_rows: Tensor | None,
    want_rows: bool, want_padded: bool,
) -> Pair:  # fmt: skip
    return g.new_empty(g.shape if want_rows else 0), g.new_empty(g.shape if want_padded else 0)


normalise = register(
    "normalise(Tensor g, Tensor sums, Tensor gamma, Tensor beta, float eps, Tensor? token, Tensor? n_rows,"
    " bool want_rows, bool want_padded) -> (Tensor, Tensor)",
    ref=normalise_ref,
    cpu=normalise_cpu,
    cuda=normalise_triton,
    fake=_normalise_fake,
)
