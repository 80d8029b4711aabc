"""embed_layer_norm_backward: the gradient of the summed embeddings, and of the LayerNorm's weight and bias.

The sum h is read as the forward left it, in the order of rows; dy goes back through the dropout and through the
LayerNorm (kernels/layer_norm_backward.py). dh is stored at the token's place, zeros where a token is no row, so that
what follows is torch's own deterministic embedding backward. Bytes: 2 * T * N read, T * N written; bandwidth-bound.
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
from bert_fast.kernels.registry import Unread, register_kernel
from bert_fast.kernels.runtime import device_guard, follow_previous, launch_options, tl, triton

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def table_gradient(
    dh: torch.Tensor, index: torch.Tensor, table: torch.Tensor | Unread, padding_idx: int
) -> torch.Tensor:
    """Gradient of a table (rows, N) read at index (B, S): dh (B*S, N) summed by row, none for padding_idx (-1: all)."""
    if index.stride(0) == 0:  # one row of indices for the whole batch, as positions usually are: a plain sum first
        dh, index = dh.view(*index.shape, -1).sum(0), index[0]
    # the forward made NaN of an index outside the table; here one would write outside it
    index = index.reshape(-1).clamp(0, table.shape[0] - 1)
    return torch.ops.aten.embedding_dense_backward(dh, index, table.shape[0], padding_idx, False).to(table.dtype)


def _check(
    dy: torch.Tensor, dy_padded: bool, h: torch.Tensor, weight: torch.Tensor, token: torch.Tensor,
    seed: torch.Tensor | None, p: float,
) -> None:  # fmt: skip
    op = "embed_layer_norm_backward"
    if h.dim() != 2 or h.shape[0] != token.shape[0] or not h.is_contiguous():
        raise ValueError(f"{op}: h is {tuple(h.shape)}, expected dense rows of {token.shape[0]} tokens")
    check_backward(op, dy, dy_padded, h, weight, token)
    check_dropout(op, seed, p, h.device)


@triton.jit(do_not_specialize=["T", "site", "threshold"], do_not_specialize_on_alignment=["n_rows_ptr", "seed_ptr"])
def _embed_layer_norm_backward_kernel(
    dy_ptr, stride_dy, h_ptr, weight_ptr, token_ptr, n_rows_ptr, seed_ptr, dh_ptr, partial_ptr,
    T, N, eps, site, threshold, rescale,
    HAS_N_ROWS: tl.constexpr, HAS_DROPOUT: tl.constexpr, DY_PADDED: tl.constexpr, PDL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: tiles of ROWS rows, as far apart as there are programs; rows that are none get zeros."""
    follow_previous(PDL)
    cols = tl.arange(0, BLOCK_N)[None, :]
    n = T
    if HAS_N_ROWS:
        n = tl.load(n_rows_ptr)
    if HAS_DROPOUT:
        k0, k1 = dropout_keys(seed_ptr, site, 0)
    weight = tl.load(weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK_N,), tl.float32)
    d_bias = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (rows < n) & (cols < N)
        token = tl.load(token_ptr + rows, mask=rows < T, other=0).to(tl.int64)
        h = tl.load(h_ptr + rows * N + cols, mask=mask, other=0.0).to(tl.float32)
        at = token if DY_PADDED else rows
        dy = tl.load(dy_ptr + at * stride_dy + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_DROPOUT:
            dy = tl.where(dropout_kept((token * N + cols).to(tl.int32), k0, k1, threshold), dy * rescale, 0.0)
        dh, xhat = norm_backward(dy, h, weight, mask, N, eps)
        dh = tl.where(mask, dh, 0.0)
        tl.store(dh_ptr + token * N + cols, dh.to(dh_ptr.dtype.element_ty), mask=(rows < T) & (cols < N))
        d_weight += tl.sum(dy * xhat, 0)
        d_bias += tl.sum(dy, 0)
    store_partials(partial_ptr, 0, 2, d_weight, N)
    store_partials(partial_ptr, 1, 2, d_bias, N)


def embed_layer_norm_backward_cpu(
    dy: torch.Tensor, dy_padded: bool, h: torch.Tensor, weight: torch.Tensor, eps: float, token: torch.Tensor,
    n_rows: torch.Tensor | None, seed: torch.Tensor | None, site: int, p: float,
) -> Three:  # fmt: skip
    _check(dy, dy_padded, h, weight, token, seed, p)
    n = used_rows(token, n_rows)
    index = token[:n].long()
    dy = dropout_rows_ref(dy[index] if dy_padded else dy[:n], token, seed, site, p)
    dh, d_weight, d_bias = layer_norm_gradients(dy, h[:n], weight, eps)
    return dh.new_zeros(h.shape).index_copy(0, index, dh), d_weight, d_bias


def embed_layer_norm_backward_triton(
    dy: torch.Tensor, dy_padded: bool, h: torch.Tensor, weight: torch.Tensor, eps: float, token: torch.Tensor,
    n_rows: torch.Tensor | None, seed: torch.Tensor | None, site: int, p: float,
) -> Three:  # fmt: skip
    _check(dy, dy_padded, h, weight, token, seed, p)
    T, N = h.shape
    dh, *sums = outputs = torch.empty_like(h), weight.new_empty(N), weight.new_empty(N)
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    programs, tile = tile_of(T, N, h.device)
    partial = h.new_empty((programs, 2, N), dtype=torch.float32)
    with device_guard(h):
        _embed_layer_norm_backward_kernel[(programs,)](
            dy, dy.stride(0), h, weight.contiguous(), token, n_rows, seed if p else None, dh, partial, T, N, eps, site,
            threshold(p), rescale(p), HAS_N_ROWS=n_rows is not None, HAS_DROPOUT=p > 0, DY_PADDED=dy_padded, **tile,
            **launch_options(),
        )  # fmt: skip
    add_partials(partial, sums)
    return outputs


def _embed_layer_norm_backward_fake(
    dy: torch.Tensor, dy_padded: bool, h: torch.Tensor, weight: torch.Tensor, eps: float, token: torch.Tensor,
    n_rows: torch.Tensor | None, seed: torch.Tensor | None, site: int, p: float,
) -> Three:  # fmt: skip
    return torch.empty_like(h), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


embed_layer_norm_backward = register_kernel(
    "embed_layer_norm_backward(Tensor dy, bool dy_padded, Tensor h, Tensor weight, float eps, Tensor token,"
    " Tensor? n_rows, Tensor? seed, int site, float p) -> (Tensor, Tensor, Tensor)",
    cpu=embed_layer_norm_backward_cpu,
    cuda=embed_layer_norm_backward_triton,
    fake=_embed_layer_norm_backward_fake,
)
