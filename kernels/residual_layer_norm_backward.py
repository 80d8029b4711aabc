"""residual_layer_norm_backward: the gradients of LayerNorm(dropout(x) + residual), one pass.

d_residual = dh (kernels/layer_norm_backward.py), dx = dh through the dropout, whose numbers are drawn again. h is
computed again from x and residual. Bytes: 3 * T * N read, T * N written, twice where dx is not d_residual;
bandwidth-bound. The column sums of dx are the bias gradient of the product that made x, here for no extra byte.
"""

from __future__ import annotations

import torch

from bert_fast.kernels.column_sums import add_partials
from bert_fast.kernels.dropout import (
    check_dropout,
    dropout_kept,
    dropout_keys,
    dropout_rows_ref,
    rescale,
    threshold,
)
from bert_fast.kernels.layer_norm_backward import (
    check_backward,
    layer_norm_gradients,
    norm_backward,
    store_partials,
    tile_of,
)
from bert_fast.kernels.linear import used_rows
from bert_fast.kernels.registry import register_kernel
from bert_fast.kernels.runtime import device_guard, follow_previous, launch_options, tl, triton

Five = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def shares_gradient(x: torch.Tensor, residual: torch.Tensor, p: float) -> bool:
    """Whether dx is d_residual, and the op returns it only once."""
    return not p and x.dtype == residual.dtype


def _check(
    dy: torch.Tensor, dy_padded: bool, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor,
    token: torch.Tensor | None, seed: torch.Tensor | None, p: float,
) -> None:  # fmt: skip
    op = "residual_layer_norm_backward"
    if x.dim() != 2 or residual.shape != x.shape or x.stride(1) != 1 or residual.stride(1) != 1:
        raise ValueError(
            f"{op}: x is {tuple(x.shape)} and residual {tuple(residual.shape)}, expected the same (T, N), unit rows"
        )
    check_backward(op, dy, dy_padded, x, weight, token)
    check_dropout(op, seed, p, x.device)


@triton.jit(do_not_specialize=["T", "site", "threshold"], do_not_specialize_on_alignment=["n_rows_ptr", "seed_ptr"])
def _residual_layer_norm_backward_kernel(
    dy_ptr, x_ptr, residual_ptr, weight_ptr, token_ptr, n_rows_ptr, seed_ptr, dx_ptr, d_residual_ptr,
    partial_ptr,  # fp32 (programs, 3, N): column sums for weight, bias and of dx
    stride_dy, stride_x, stride_residual, T, N, eps, site, threshold, rescale,
    DY_PADDED: tl.constexpr, HAS_TOKEN: tl.constexpr, HAS_N_ROWS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    WANT_DX: tl.constexpr, WANT_PARAMS: tl.constexpr, PDL: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: tiles of ROWS rows, as far apart as there are programs."""
    follow_previous(PDL)
    cols = tl.arange(0, BLOCK_N)[None, :]
    if HAS_N_ROWS:
        T = tl.load(n_rows_ptr)
    if HAS_DROPOUT:
        k0, k1 = dropout_keys(seed_ptr, site, 0)
    weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK_N,), tl.float32)
    d_bias = tl.zeros((BLOCK_N,), tl.float32)
    dx_sum = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (rows < T) & (cols < N)
        token = rows
        if HAS_TOKEN:
            token = tl.load(token_ptr + rows, mask=rows < T, other=0).to(tl.int64)
        h = tl.load(x_ptr + rows * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_DROPOUT:
            kept = dropout_kept((token * N + cols).to(tl.int32), k0, k1, threshold)
            h = tl.where(kept, h * rescale, 0.0)
        h += tl.load(residual_ptr + rows * stride_residual + cols, mask=mask, other=0.0).to(tl.float32)
        at = token if DY_PADDED else rows
        dy = tl.load(dy_ptr + at * stride_dy + cols, mask=mask, other=0.0).to(tl.float32)
        dh, xhat = norm_backward(dy, h, weight, mask, N, eps)
        tl.store(d_residual_ptr + rows * N + cols, dh.to(d_residual_ptr.dtype.element_ty), mask=mask)
        dx = dh
        if HAS_DROPOUT:
            dx = tl.where(kept, dh * rescale, 0.0)
        if WANT_DX:
            tl.store(dx_ptr + rows * N + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if WANT_PARAMS:
            d_weight += tl.sum(dy * xhat, 0)
            d_bias += tl.sum(dy, 0)
            dx_sum += tl.sum(tl.where(mask, dx, 0.0), 0)
    if WANT_PARAMS:
        store_partials(partial_ptr, 0, 3, d_weight, N)
        store_partials(partial_ptr, 1, 3, d_bias, N)
        store_partials(partial_ptr, 2, 3, dx_sum, N)


def residual_layer_norm_backward_cpu(
    dy: torch.Tensor, dy_padded: bool, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
    token: torch.Tensor | None, n_rows: torch.Tensor | None, seed: torch.Tensor | None, site: int, p: float,
    want_params: bool,
) -> Five:  # fmt: skip
    _check(dy, dy_padded, x, residual, weight, token, seed, p)
    n = used_rows(x, n_rows)
    dy = dy.index_select(0, token[:n]) if dy_padded else dy[:n]  # type: ignore[index]
    h = dropout_rows_ref(x[:n], token, seed, site, p) + residual[:n]
    dh, d_weight, d_bias = layer_norm_gradients(dy, h, weight, eps, want_params)
    dx = dh if shares_gradient(x, residual, p) else dropout_rows_ref(dh.to(x.dtype), token, seed, site, p)
    wide = torch.float32 if x.dtype.itemsize < 4 else x.dtype
    dx_sum = dx.sum(0, dtype=wide).to(x.dtype) if want_params else x.new_empty(0)
    d_residual = _zeros_below(dh, x)
    return d_residual.new_empty(0) if dx is dh else _zeros_below(dx, x), d_residual, d_weight, d_bias, dx_sum


def _zeros_below(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The rows in use and zeros for the others, which a sum of gradients may still read."""
    return rows if len(rows) == len(like) else torch.cat([rows, rows.new_zeros(len(like) - len(rows), rows.shape[1])])


def residual_layer_norm_backward_triton(
    dy: torch.Tensor, dy_padded: bool, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
    token: torch.Tensor | None, n_rows: torch.Tensor | None, seed: torch.Tensor | None, site: int, p: float,
    want_params: bool,
) -> Five:  # fmt: skip
    _check(dy, dy_padded, x, residual, weight, token, seed, p)
    outputs = _residual_layer_norm_backward_fake(
        dy, dy_padded, x, residual, weight, eps, token, n_rows, seed, site, p, want_params
    )  # fmt: skip
    dx, d_residual, *sums = outputs
    T, N = x.shape
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    programs, tile = tile_of(T, N, x.device)
    partial = x.new_empty((programs, 3, N) if want_params else 0, dtype=torch.float32)
    with device_guard(x):
        _residual_layer_norm_backward_kernel[(programs,)](
            dy, x, residual, weight.contiguous(), token, n_rows, seed if p else None, dx, d_residual, partial,
            dy.stride(0), x.stride(0), residual.stride(0), T, N, eps, site, threshold(p), rescale(p),
            DY_PADDED=dy_padded, HAS_TOKEN=token is not None, HAS_N_ROWS=n_rows is not None, HAS_DROPOUT=p > 0,
            WANT_DX=not shares_gradient(x, residual, p), WANT_PARAMS=want_params, **tile, **launch_options(),
        )  # fmt: skip
    if want_params:
        add_partials(partial, sums)
    return outputs


def _residual_layer_norm_backward_fake(
    dy: torch.Tensor, dy_padded: bool, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float,
    token: torch.Tensor | None, n_rows: torch.Tensor | None, seed: torch.Tensor | None, site: int, p: float,
    want_params: bool,
) -> Five:  # fmt: skip
    shape, N = x.shape, x.shape[1] if want_params else 0
    dx = x.new_empty(0 if shares_gradient(x, residual, p) else shape)
    return dx, residual.new_empty(shape), weight.new_empty(N), weight.new_empty(N), x.new_empty(N)


residual_layer_norm_backward = register_kernel(
    "residual_layer_norm_backward(Tensor dy, bool dy_padded, Tensor x, Tensor residual, Tensor weight, float eps,"
    " Tensor? token, Tensor? n_rows, Tensor? seed, int site, float p, bool want_params)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=residual_layer_norm_backward_cpu,
    cuda=residual_layer_norm_backward_triton,
    fake=_residual_layer_norm_backward_fake,
)
