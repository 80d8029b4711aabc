"""embed_layer_norm_backward: the gradient of the summed embeddings, and of the LayerNorm's weight and bias.

The three rows of a token are gathered again; dy goes back through the dropout and through the LayerNorm
(kernels/layer_norm_backward.py). dh is stored at the token's place, zeros where a token is no row, so that what follows
is torch's own deterministic embedding backward. Bytes: up to 4 * T * N read, T * N written; bandwidth-bound.
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

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def table_gradient(dh: torch.Tensor, index: torch.Tensor, table: torch.Tensor, padding_idx: int) -> torch.Tensor:
    """Gradient of a table (rows, N) read at index (B, S): dh (B*S, N) summed by row, none for padding_idx (-1: all)."""
    if index.stride(0) == 0:  # one row of indices for the whole batch, as positions usually are: a plain sum first
        dh, index = dh.view(*index.shape, -1).sum(0), index[0]
    # the forward made NaN of an index outside the table; here one would write outside it
    index = index.reshape(-1).clamp(0, table.shape[0] - 1)
    return torch.ops.aten.embedding_dense_backward(dh, index, table.shape[0], padding_idx, False).to(table.dtype)


def _check(
    dy: torch.Tensor, dy_padded: bool, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None,
    token_type_ids: torch.Tensor | None, position_ids: torch.Tensor, word: torch.Tensor,
    token_type: torch.Tensor | None, position: torch.Tensor, weight: torch.Tensor,
    token: torch.Tensor, seed: torch.Tensor | None, p: float,
) -> None:  # fmt: skip
    op = "embed_layer_norm_backward"
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(f"{op}: expected exactly one of input_ids and inputs_embeds")
    shape = position_ids.shape
    first = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
    shapes = {x.shape for x in (first, token_type_ids) if x is not None}
    if shapes != {shape} or token.shape[0] != shape.numel():
        raise ValueError(f"{op}: the indices and {token.shape[0]} tokens do not fit {tuple(shape)}")
    for name, t in {"word": word, "token_type": token_type, "position": position}.items():
        if t is not None and (t.dim() != 2 or t.shape[1] != word.shape[1] or not t.is_contiguous()):
            raise ValueError(f"{op}: {name} is {tuple(t.shape)}, expected dense (rows, {word.shape[1]})")
    check_backward(op, dy, dy_padded, word.new_empty(1).expand(token.shape[0], word.shape[1]), weight, token)
    check_dropout(op, seed, p, word.device)


@triton.jit
def _gather(table_ptr, index, size, mask, cols, N):
    """A tile of rows of a table (size, N) in fp32, NaN where the index is outside, as the forward has it."""
    inside = (index >= 0) & (index < size)
    rows = tl.load(table_ptr + index.to(tl.int64) * N + cols, mask=mask & inside, other=0.0).to(tl.float32)
    return tl.where(inside, rows, float("nan"))


@triton.jit(
    do_not_specialize=["T", "S", "stride_ids_b", "stride_types_b", "stride_positions_b", "stride_embeds_b", "site",
                       "threshold"],
    do_not_specialize_on_alignment=["n_rows_ptr", "seed_ptr"],
)  # fmt: skip
def _embed_layer_norm_backward_kernel(
    dy_ptr, stride_dy, ids_ptr, stride_ids_b, stride_ids_s, embeds_ptr, stride_embeds_b, stride_embeds_s,
    stride_embeds_n, types_ptr, stride_types_b, stride_types_s, positions_ptr, stride_positions_b, stride_positions_s,
    word_ptr, type_ptr, position_ptr, weight_ptr, token_ptr, n_rows_ptr, seed_ptr, dh_ptr, partial_ptr,
    T, S, N, n_words, n_types, n_positions, eps, site, threshold, rescale,
    HAS_IDS: tl.constexpr, HAS_TYPES: tl.constexpr, HAS_N_ROWS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    DY_PADDED: tl.constexpr, PDL: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
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
        is_row = rows < n
        mask = is_row & (cols < N)
        token = tl.load(token_ptr + rows, mask=rows < T, other=0)
        b = (token // S).to(tl.int64)
        s = (token % S).to(tl.int64)
        token = token.to(tl.int64)
        if HAS_IDS:
            index = tl.load(ids_ptr + b * stride_ids_b + s * stride_ids_s, mask=is_row, other=0)
            h = _gather(word_ptr, index, n_words, mask, cols, N)
        else:
            embeds = embeds_ptr + b * stride_embeds_b + s * stride_embeds_s + cols.to(tl.int64) * stride_embeds_n
            h = tl.load(embeds, mask=mask, other=0.0).to(tl.float32)
        if HAS_TYPES:
            index = tl.load(types_ptr + b * stride_types_b + s * stride_types_s, mask=is_row, other=0)
            h += _gather(type_ptr, index, n_types, mask, cols, N)
        index = tl.load(positions_ptr + b * stride_positions_b + s * stride_positions_s, mask=is_row, other=0)
        h += _gather(position_ptr, index, n_positions, mask, cols, N)
        h = tl.where(mask, h, 0.0)
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
    dy: torch.Tensor, dy_padded: bool, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None,
    token_type_ids: torch.Tensor | None, position_ids: torch.Tensor, word: torch.Tensor,
    token_type: torch.Tensor | None, position: torch.Tensor, weight: torch.Tensor, eps: float,
    token: torch.Tensor, n_rows: torch.Tensor | None, seed: torch.Tensor | None, site: int, p: float,
) -> Three:  # fmt: skip
    indices = (token_type_ids, position_ids)
    _check(
        dy, dy_padded, input_ids, inputs_embeds, *indices, word, token_type, position, weight, token, seed, p
    )  # fmt: skip
    index = token[: used_rows(token, n_rows)].long()
    if inputs_embeds is None:
        h = word[input_ids.reshape(-1)[index]]  # type: ignore[union-attr]
    else:
        h = inputs_embeds.reshape(-1, word.shape[1])[index]
    if token_type is not None:
        h = h + token_type[token_type_ids.reshape(-1)[index]]
    h = h + position[position_ids.reshape(-1)[index]]
    dy = dropout_rows_ref(dy[index] if dy_padded else dy[: len(index)], token, seed, site, p)
    dh, d_weight, d_bias = layer_norm_gradients(dy, h, weight, eps)
    return dh.new_zeros(token.shape[0], word.shape[1]).index_copy(0, index, dh), d_weight, d_bias


def embed_layer_norm_backward_triton(
    dy: torch.Tensor, dy_padded: bool, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None,
    token_type_ids: torch.Tensor | None, position_ids: torch.Tensor, word: torch.Tensor,
    token_type: torch.Tensor | None, position: torch.Tensor, weight: torch.Tensor, eps: float,
    token: torch.Tensor, n_rows: torch.Tensor | None, seed: torch.Tensor | None, site: int, p: float,
) -> Three:  # fmt: skip
    indices = (token_type_ids, position_ids)
    _check(
        dy, dy_padded, input_ids, inputs_embeds, *indices, word, token_type, position, weight, token, seed, p
    )  # fmt: skip
    T, N, S = token.shape[0], word.shape[1], position_ids.shape[1]
    dh, *sums = outputs = word.new_empty(T, N), weight.new_empty(N), weight.new_empty(N)
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    programs, tile = tile_of(T, N, word.device)
    partial = word.new_empty((programs, 2, N), dtype=torch.float32)
    with device_guard(word):
        _embed_layer_norm_backward_kernel[(programs,)](
            dy, dy.stride(0), input_ids, *((0, 0) if input_ids is None else input_ids.stride()),
            inputs_embeds, *((0, 0, 0) if inputs_embeds is None else inputs_embeds.stride()),
            token_type_ids, *((0, 0) if token_type_ids is None else token_type_ids.stride()),
            position_ids, *position_ids.stride(),
            word, token_type, position, weight.contiguous(), token, n_rows, seed if p else None, dh, partial,
            T, S, N, word.shape[0], 0 if token_type is None else token_type.shape[0], position.shape[0], eps, site,
            threshold(p), rescale(p), HAS_IDS=input_ids is not None, HAS_TYPES=token_type is not None,
            HAS_N_ROWS=n_rows is not None, HAS_DROPOUT=p > 0, DY_PADDED=dy_padded, **tile, **launch_options(),
        )  # fmt: skip
    add_partials(partial, sums)
    return outputs


def _embed_layer_norm_backward_fake(
    dy: torch.Tensor, dy_padded: bool, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None,
    token_type_ids: torch.Tensor | None, position_ids: torch.Tensor, word: torch.Tensor,
    token_type: torch.Tensor | None, position: torch.Tensor, weight: torch.Tensor, eps: float,
    token: torch.Tensor, n_rows: torch.Tensor | None, seed: torch.Tensor | None, site: int, p: float,
) -> Three:  # fmt: skip
    return word.new_empty(token.shape[0], word.shape[1]), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


embed_layer_norm_backward = register_kernel(
    "embed_layer_norm_backward(Tensor dy, bool dy_padded, Tensor? input_ids, Tensor? inputs_embeds,"
    " Tensor? token_type_ids, Tensor position_ids, Tensor word, Tensor? token_type, Tensor position, Tensor weight,"
    " float eps, Tensor token, Tensor? n_rows, Tensor? seed, int site, float p) -> (Tensor, Tensor, Tensor)",
    cpu=embed_layer_norm_backward_cpu,
    cuda=embed_layer_norm_backward_triton,
    fake=_embed_layer_norm_backward_fake,
)
