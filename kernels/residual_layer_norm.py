"""residual_layer_norm: LayerNorm(dropout(x) + residual) on packed rows, one pass (BertSelfOutput, BertOutput).

y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias with h = dropout(x) + residual, statistics in fp32, biased
variance (Ba, Kiros & Hinton 2016). Bytes: 2 * T * N read, T * N written for each output asked for; bandwidth-bound.
Under autocast x is in half precision and all else, the outputs too, in fp32.

The output is wanted as rows (the next layer's input), padded (B * S, N: it leaves the model), or both; the padded one
is stored through `token` straight away, zeros for the tokens that are no row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from bert_fast.kernels.dropout import check_dropout, dropout_kept, dropout_keys, dropout_rows_ref, rescale, threshold
from bert_fast.kernels.layer_norm_backward import output_gradient
from bert_fast.kernels.linear import used_rows
from bert_fast.kernels.registry import Grads, register
from bert_fast.kernels.residual_layer_norm_backward import residual_layer_norm_backward, shares_gradient
from bert_fast.kernels.runtime import device_guard, follow_previous, launch_options, next_power_of_2, tl, triton

Pair = tuple[torch.Tensor, torch.Tensor]


def to_padded(rows: torch.Tensor, token: torch.Tensor | None, n: int) -> torch.Tensor:
    """rows (n of T, N) to their tokens' places in (T, N), zeros elsewhere."""
    if token is None:
        raise ValueError("padded output asked for without a token map")
    return rows.new_zeros(token.shape[0], rows.shape[1]).index_copy(0, token[:n].long(), rows[:n])


def residual_layer_norm_ref(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float,
    token: torch.Tensor | None, n_rows: torch.Tensor | None, want_rows: bool, want_padded: bool,
    seed: torch.Tensor | None = None, site: int = 0, p: float = 0.0,
) -> Pair:  # fmt: skip
    """x, residual (T, N), x maybe of less precision; weight, bias (N,); token int32 (T,) for the padded output and the
    dropout; n_rows int32 (1,) or None (all T); seed, site, p: kernels/dropout.py.

    Returns (rows (T, N), padded (T, N)) in residual's dtype, empty where not wanted.
    """
    n = used_rows(x, n_rows)
    h = dropout_rows_ref(x[:n], token, seed, site, p).to(residual.dtype) + residual[:n]
    y = F.layer_norm(h, (x.shape[1],), weight, bias, eps)
    rows = F.pad(y, (0, 0, 0, x.shape[0] - n)) if want_rows else residual.new_empty(0)
    return rows, to_padded(y, token, n) if want_padded else residual.new_empty(0)


@triton.jit
def _layer_norm(h, weight_ptr, bias_ptr, cols, N, eps):
    """One row in registers, (BLOCK_N,) fp32: centred variance, no second pass over memory."""
    mean = tl.sum(h, 0) / N
    centred = tl.where(cols < N, h - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / N + eps)
    weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    return centred * rstd * weight + bias


@triton.jit
def _store(y, rows_ptr, padded_ptr, token_ptr, row, cols, N, WANT_ROWS: tl.constexpr, WANT_PADDED: tl.constexpr):
    """One row to the packed output, to its token's place in the padded one, or to both; row is int64."""
    if WANT_ROWS:
        tl.store(rows_ptr + row * N + cols, y.to(rows_ptr.dtype.element_ty), mask=cols < N)
    if WANT_PADDED:
        token = tl.load(token_ptr + row).to(tl.int64)
        tl.store(padded_ptr + token * N + cols, y.to(padded_ptr.dtype.element_ty), mask=cols < N)


@triton.jit
def _store_dropped(padded_ptr, token_ptr, row, cols, N, WANT_PADDED: tl.constexpr):
    """The zeros of a token that is no row."""
    if WANT_PADDED:
        token = tl.load(token_ptr + row).to(tl.int64)
        zero = tl.zeros(cols.shape, padded_ptr.dtype.element_ty)
        tl.store(padded_ptr + token * N + cols, zero, mask=cols < N)


@triton.jit
def _drop(x, seed_ptr, site, threshold, rescale, token, cols, N):
    """Dropout of one row in registers; token is int64."""
    k0, k1 = dropout_keys(seed_ptr, site, 0)
    return tl.where(dropout_kept((token * N + cols).to(tl.int32), k0, k1, threshold), x * rescale, 0.0)


@triton.jit(do_not_specialize=["site", "threshold"], do_not_specialize_on_alignment=["n_rows_ptr", "seed_ptr"])
def _residual_layer_norm_kernel(
    x_ptr,  # (T, N); with SPLIT_K > 1 fp32 (SPLIT_K, T, N), parts of a product's sums (kernels/gemm.py)
    x_bias_ptr,  # (N,) the product's bias, where it has yet to be added
    residual_ptr, weight_ptr, bias_ptr, rows_ptr, padded_ptr, token_ptr, n_rows_ptr, seed_ptr, stride_x,
    stride_residual, N, eps, site, threshold, rescale,
    SPLIT_K: tl.constexpr, HAS_X_BIAS: tl.constexpr, HAS_N_ROWS: tl.constexpr, HAS_TOKEN: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, WANT_ROWS: tl.constexpr, WANT_PADDED: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    follow_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    live = True
    if HAS_N_ROWS:
        live = row < tl.load(n_rows_ptr)
    if live:
        x = tl.load(x_ptr + row * stride_x + cols, mask=cols < N, other=0.0).to(tl.float32)
        for part in tl.static_range(1, SPLIT_K):
            at = (part * tl.num_programs(0) + row) * stride_x
            x += tl.load(x_ptr + at + cols, mask=cols < N, other=0.0)
        if HAS_X_BIAS:
            x += tl.load(x_bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
        if HAS_DROPOUT:
            token = row
            if HAS_TOKEN:
                token = tl.load(token_ptr + row).to(tl.int64)
            x = _drop(x, seed_ptr, site, threshold, rescale, token, cols, N)
        r = tl.load(residual_ptr + row * stride_residual + cols, mask=cols < N, other=0.0).to(tl.float32)
        y = _layer_norm(x + r, weight_ptr, bias_ptr, cols, N, eps)
        _store(y, rows_ptr, padded_ptr, token_ptr, row, cols, N, WANT_ROWS, WANT_PADDED)
    else:
        _store_dropped(padded_ptr, token_ptr, row, cols, N, WANT_PADDED)


def num_warps(block: int) -> int:
    """Warps of a one-row-per-program kernel: 16 elements a thread, at least one warp."""
    return min(max(block // 512, 1), 8)


def check_layer_norm(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)} and strides {x.stride()}, expected (T, N) with unit rows")
    for name, p in (("weight", weight), ("bias", bias)):
        if p.shape != x.shape[1:] or p.device != x.device:
            raise ValueError(f"{op}: {name} is {tuple(p.shape)} on {p.device}, expected ({x.shape[1]},) on {x.device}")


def check(op: str, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Shapes and dtypes of x, the residual of the same shape and the LayerNorm's parameters."""
    check_layer_norm(op, x, weight, bias)
    fits = residual.dtype in (x.dtype, torch.float32) and x.dtype.itemsize <= residual.dtype.itemsize
    if residual.shape != x.shape or not fits or residual.stride(1) != 1:
        raise ValueError(
            f"{op}: residual is {tuple(residual.shape)} {residual.dtype}, expected {tuple(x.shape)} {x.dtype} or "
            "fp32 with unit rows"
        )


def residual_layer_norm_cpu(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float,
    token: torch.Tensor | None, n_rows: torch.Tensor | None, want_rows: bool, want_padded: bool,
    seed: torch.Tensor | None = None, site: int = 0, p: float = 0.0,
) -> Pair:  # fmt: skip
    check("residual_layer_norm", x, residual, weight, bias)
    check_dropout("residual_layer_norm", seed, p, x.device)
    return add_and_norm(x, residual, weight, bias, eps, token, n_rows, want_rows, want_padded, seed, site, p)


def add_and_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float,
    token: torch.Tensor | None, n_rows: torch.Tensor | None, want_rows: bool, want_padded: bool,
    seed: torch.Tensor | None = None, site: int = 0, p: float = 0.0,
) -> Pair:  # fmt: skip
    """The CPU body on checked arguments."""
    n = used_rows(x, n_rows)
    if n < x.shape[0]:
        x = x[:n]
    h = dropout_rows_ref(x, token, seed, site, p) + residual[:n]
    y = F.layer_norm(h, weight.shape, weight, bias, eps)
    padded = to_padded(y, token, n) if want_padded else y.new_empty(0)
    if want_rows and n < residual.shape[0]:
        rows = y.new_empty(residual.shape)
        rows[:n] = y
        return rows, padded
    return (y if want_rows else y.new_empty(0)), padded


def launch(
    x: torch.Tensor, x_bias: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
    eps: float, token: torch.Tensor | None, n_rows: torch.Tensor | None, want_rows: bool, want_padded: bool,
    seed: torch.Tensor | None = None, site: int = 0, p: float = 0.0,
) -> Pair:  # fmt: skip
    """LayerNorm(dropout(x + x_bias) + residual); x (T, N), or fp32 (SPLIT_K, T, N), summed over the first axis."""
    if want_padded and token is None:
        raise ValueError("padded output asked for without a token map")
    rows, padded = _residual_layer_norm_fake(
        residual, residual, weight, bias, eps, token, n_rows, want_rows, want_padded
    )  # fmt: skip
    T, N = residual.shape
    BLOCK_N = next_power_of_2(N)
    if T:
        with device_guard(x):
            _residual_layer_norm_kernel[(T,)](
                x, x_bias, residual, weight.contiguous(), bias.contiguous(), rows, padded, token, n_rows,
                seed if p else None, x.stride(-2), residual.stride(0), N, eps, site, threshold(p), rescale(p),
                SPLIT_K=x.shape[0] if x.dim() == 3 else 1, HAS_X_BIAS=x_bias is not None,
                HAS_N_ROWS=n_rows is not None, HAS_TOKEN=token is not None, HAS_DROPOUT=p > 0, WANT_ROWS=want_rows,
                WANT_PADDED=want_padded, BLOCK_N=BLOCK_N, num_warps=num_warps(BLOCK_N), **launch_options(),
            )  # fmt: skip
    return rows, padded


def residual_layer_norm_triton(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float,
    token: torch.Tensor | None, n_rows: torch.Tensor | None, want_rows: bool, want_padded: bool,
    seed: torch.Tensor | None = None, site: int = 0, p: float = 0.0,
) -> Pair:  # fmt: skip
    check("residual_layer_norm", x, residual, weight, bias)
    check_dropout("residual_layer_norm", seed, p, x.device)
    return launch(x, None, residual, weight, bias, eps, token, n_rows, want_rows, want_padded, seed, site, p)


def _residual_layer_norm_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float,
    token: torch.Tensor | None, n_rows: torch.Tensor | None, want_rows: bool, want_padded: bool,
    seed: torch.Tensor | None = None, site: int = 0, p: float = 0.0,
) -> Pair:  # fmt: skip
    shape = x.shape
    return residual.new_empty(shape if want_rows else 0), residual.new_empty(shape if want_padded else 0)


def _gradient(
    needs: Sequence[bool], inputs: Sequence[Any], outputs: Sequence[Any], grads: Sequence[torch.Tensor | None]
) -> Grads:
    x, residual, weight, _, eps, token, n_rows, want_rows, want_padded, seed, site, p = inputs
    dy, dy_padded = output_gradient(grads, want_rows, want_padded, token)
    if dy is None:
        return (None,) * len(inputs)
    dx, d_residual, d_weight, d_bias, _ = residual_layer_norm_backward(
        dy, dy_padded, x, residual, weight, eps, token, n_rows, seed, site, p, needs[2] or needs[3]
    )
    dx = d_residual if shares_gradient(x, residual, p) else dx
    found = (dx, d_residual, d_weight, d_bias)
    return (*(g if need else None for g, need in zip(found, needs, strict=False)), *[None] * (len(inputs) - 4))


residual_layer_norm = register(
    "residual_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, Tensor? token,"
    " Tensor? n_rows, bool want_rows, bool want_padded, Tensor? seed=None, int site=0, float p=0.0)"
    " -> (Tensor, Tensor)",
    ref=residual_layer_norm_ref,
    cpu=residual_layer_norm_cpu,
    cuda=residual_layer_norm_triton,
    fake=_residual_layer_norm_fake,
    gradient=_gradient,
)
