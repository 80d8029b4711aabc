"""embed_layer_norm: word + position + token-type rows gathered, summed and normalised in one pass, stored packed.

Row r is the token `token[r]`; the sum and the statistics are fp32 (transformers rounds the two sums to the model's
dtype). An index outside its table reads nothing and makes the row NaN: never a wrong row that looks right.
Dropout, where there is any, comes after the LayerNorm. Bytes: up to 3 * T * N gathered, T * N written for each output.

The sum before the LayerNorm can be had too, for the backward, which needs no table then: T * N more written, and read
there instead of up to 3 * T * N gathered; N numbers a token are kept.
Source of the operation: transformers BertEmbeddings.forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from bert_fast.kernels.dropout import check_dropout, dropout_rows_ref, rescale, threshold
from bert_fast.kernels.embed_layer_norm_backward import embed_layer_norm_backward, table_gradient
from bert_fast.kernels.layer_norm_backward import output_gradient
from bert_fast.kernels.linear import used_rows
from bert_fast.kernels.registry import Grads, gradients_of, register
from bert_fast.kernels.residual_layer_norm import (
    _drop,
    _layer_norm,
    _store,
    _store_dropped,
    check_layer_norm,
    num_warps,
    to_padded,
)
from bert_fast.kernels.runtime import device_guard, follow_previous, launch_options, next_power_of_2, tl, triton

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def embed_layer_norm_ref(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor, word: torch.Tensor, token_type: torch.Tensor | None, position: torch.Tensor,
    weight: torch.Tensor, bias: torch.Tensor, eps: float, padding_idx: int, token: torch.Tensor,
    n_rows: torch.Tensor | None, want_rows: bool, want_padded: bool, seed: torch.Tensor | None = None, site: int = 0,
    p: float = 0.0, position_padding_idx: int = -1, want_sum: bool = False,
) -> Triple:  # fmt: skip
    """input_ids (B, S) or inputs_embeds (B, S, N), exactly one; token_type_ids, position_ids (B, S), strides of 0 fine.

    word (V, N), token_type (types, N), position (P, N) tables; weight, bias (N,); padding_idx, position_padding_idx:
    the row of that table that gets no gradient, or -1; token_type_ids and token_type: None where a model has none;
    token int32 (B*S,), n_rows int32 (1,) or None (all); seed, site, p: kernels/dropout.py.

    Returns (rows, padded, the sum in the order of rows), each (B*S, N), or empty where not wanted. There is no gradient
    without the sum.
    """
    index = token[: used_rows(token, n_rows)].long()
    if inputs_embeds is None:
        assert input_ids is not None
        h = F.embedding(input_ids.reshape(-1)[index], word, None if padding_idx < 0 else padding_idx)
    else:
        h = inputs_embeds.reshape(-1, word.shape[1])[index]
    if token_type is not None:
        h = h + F.embedding(token_type_ids.reshape(-1)[index], token_type)
    skipped = None if position_padding_idx < 0 else position_padding_idx
    h = h + F.embedding(position_ids.reshape(-1)[index], position, skipped)
    outputs = _normalised(h, weight, bias, eps, token, want_rows, want_padded, seed, site, p)
    return *outputs, _up_to(h, token) if want_sum else h.new_empty(0)


def _up_to(rows: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """The rows in use, and zeros for the other tokens."""
    return rows if len(rows) == len(token) else F.pad(rows, (0, 0, 0, len(token) - len(rows)))


def _normalised(
    h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, token: torch.Tensor, want_rows: bool,
    want_padded: bool, seed: torch.Tensor | None, site: int, p: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(rows, padded) of the rows in use."""
    y = dropout_rows_ref(F.layer_norm(h, weight.shape, weight, bias, eps), token, seed, site, p)
    rows = _up_to(y, token) if want_rows else y.new_empty(0)
    return rows, to_padded(y, token, len(h)) if want_padded else y.new_empty(0)


@triton.jit
def _gather(table_ptr, index, size, cols, N):
    """Row `index` of a table (size, N) in fp32, NaN where the index is outside."""
    inside = (index >= 0) & (index < size)
    return tl.load(table_ptr + index.to(tl.int64) * N + cols, mask=inside & (cols < N), other=float("nan")).to(
        tl.float32
    )


@triton.jit(
    do_not_specialize=[
        *("S", "stride_ids_b", "stride_types_b", "stride_positions_b", "stride_embeds_b", "site", "threshold"),
    ],
    do_not_specialize_on_alignment=["n_rows_ptr", "seed_ptr"],
)
def _embed_layer_norm_kernel(
    ids_ptr, stride_ids_b, stride_ids_s, embeds_ptr, stride_embeds_b, stride_embeds_s, stride_embeds_n,
    types_ptr, stride_types_b, stride_types_s, positions_ptr, stride_positions_b, stride_positions_s,
    word_ptr, type_ptr, position_ptr, weight_ptr, bias_ptr, rows_ptr, padded_ptr, sum_ptr, token_ptr,
    n_rows_ptr, seed_ptr, S, N, n_words, n_types, n_positions, eps, site, threshold, rescale,
    HAS_IDS: tl.constexpr, HAS_TYPES: tl.constexpr, HAS_N_ROWS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    WANT_ROWS: tl.constexpr, WANT_PADDED: tl.constexpr, WANT_SUM: tl.constexpr, PDL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    follow_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    live = True
    if HAS_N_ROWS:
        live = row < tl.load(n_rows_ptr)
    if live:
        token = tl.load(token_ptr + row)
        b = (token // S).to(tl.int64)
        s = (token % S).to(tl.int64)
        if HAS_IDS:
            h = _gather(word_ptr, tl.load(ids_ptr + b * stride_ids_b + s * stride_ids_s), n_words, cols, N)
        else:
            embeds = embeds_ptr + b * stride_embeds_b + s * stride_embeds_s + cols.to(tl.int64) * stride_embeds_n
            h = tl.load(embeds, mask=cols < N, other=0.0).to(tl.float32)
        if HAS_TYPES:
            h += _gather(type_ptr, tl.load(types_ptr + b * stride_types_b + s * stride_types_s), n_types, cols, N)
        at = tl.load(positions_ptr + b * stride_positions_b + s * stride_positions_s)
        h += _gather(position_ptr, at, n_positions, cols, N)
        if WANT_SUM:
            tl.store(sum_ptr + row * N + cols, h.to(sum_ptr.dtype.element_ty), mask=cols < N)
        y = _layer_norm(tl.where(cols < N, h, 0.0), weight_ptr, bias_ptr, cols, N, eps)
        if HAS_DROPOUT:
            y = _drop(y, seed_ptr, site, threshold, rescale, token.to(tl.int64), cols, N)
        _store(y, rows_ptr, padded_ptr, token_ptr, row, cols, N, WANT_ROWS, WANT_PADDED)
    else:
        _store_dropped(padded_ptr, token_ptr, row, cols, N, WANT_PADDED)


def _check(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor, word: torch.Tensor, token_type: torch.Tensor | None, position: torch.Tensor,
    weight: torch.Tensor, bias: torch.Tensor, token: torch.Tensor,
) -> None:  # fmt: skip
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("embed_layer_norm: expected exactly one of input_ids and inputs_embeds")
    if (token_type_ids is None) != (token_type is None):
        raise ValueError("embed_layer_norm: expected both of token_type_ids and token_type, or neither")
    check_layer_norm("embed_layer_norm", word, weight, bias)
    for name, t in {"word": word, "token_type": token_type, "position": position}.items():
        if t is not None and (t.dim() != 2 or t.shape[1] != word.shape[1] or not t.is_contiguous()):
            raise ValueError(f"embed_layer_norm: {name} is {tuple(t.shape)}, expected dense (rows, {word.shape[1]})")
    shape = tuple(input_ids.shape) if inputs_embeds is None else tuple(inputs_embeds.shape[:2])  # type: ignore[union-attr]
    for name, t in {"token_type_ids": token_type_ids, "position_ids": position_ids}.items():
        if t is not None and tuple(t.shape) != shape:
            raise ValueError(f"embed_layer_norm: {name} has shape {tuple(t.shape)}, expected {shape}")
    if token.shape[0] != shape[0] * shape[1]:
        raise ValueError(f"embed_layer_norm: token has {token.shape[0]} entries, expected {shape[0] * shape[1]}")


def embed_layer_norm_cpu(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor, word: torch.Tensor, token_type: torch.Tensor | None, position: torch.Tensor,
    weight: torch.Tensor, bias: torch.Tensor, eps: float, padding_idx: int, token: torch.Tensor,
    n_rows: torch.Tensor | None, want_rows: bool, want_padded: bool, seed: torch.Tensor | None = None, site: int = 0,
    p: float = 0.0, position_padding_idx: int = -1, want_sum: bool = False,
) -> Triple:  # fmt: skip
    _check(input_ids, inputs_embeds, token_type_ids, position_ids, word, token_type, position, weight, bias, token)
    check_dropout("embed_layer_norm", seed, p, word.device)
    return embed_layer_norm_ref(
        input_ids, inputs_embeds, token_type_ids, position_ids, word, token_type, position, weight, bias, eps,
        padding_idx, token, n_rows, want_rows, want_padded, seed, site, p, position_padding_idx, want_sum,
    )  # fmt: skip


def embed_layer_norm_triton(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor, word: torch.Tensor, token_type: torch.Tensor | None, position: torch.Tensor,
    weight: torch.Tensor, bias: torch.Tensor, eps: float, padding_idx: int, token: torch.Tensor,
    n_rows: torch.Tensor | None, want_rows: bool, want_padded: bool, seed: torch.Tensor | None = None, site: int = 0,
    p: float = 0.0, position_padding_idx: int = -1, want_sum: bool = False,
) -> Triple:  # fmt: skip
    _check(input_ids, inputs_embeds, token_type_ids, position_ids, word, token_type, position, weight, bias, token)
    check_dropout("embed_layer_norm", seed, p, word.device)
    T, N, S = token.shape[0], word.shape[1], position_ids.shape[1]
    rows, padded, h = (word.new_empty((T, N) if want else 0) for want in (want_rows, want_padded, want_sum))
    BLOCK_N = next_power_of_2(N)
    with device_guard(word):
        _embed_layer_norm_kernel[(T,)](
            input_ids, *((0, 0) if input_ids is None else input_ids.stride()),
            inputs_embeds, *((0, 0, 0) if inputs_embeds is None else inputs_embeds.stride()),
            token_type_ids, *((0, 0) if token_type_ids is None else token_type_ids.stride()),
            position_ids, *position_ids.stride(),
            word, token_type, position, weight.contiguous(), bias.contiguous(), rows, padded, h, token,
            n_rows, seed if p else None, S, N, word.shape[0], 0 if token_type is None else token_type.shape[0],
            position.shape[0], eps, site, threshold(p), rescale(p), HAS_IDS=input_ids is not None,
            HAS_TYPES=token_type is not None, HAS_N_ROWS=n_rows is not None, HAS_DROPOUT=p > 0, WANT_ROWS=want_rows,
            WANT_PADDED=want_padded, WANT_SUM=want_sum, BLOCK_N=BLOCK_N, num_warps=num_warps(BLOCK_N),
            **launch_options(),
        )  # fmt: skip
    return rows, padded, h


def _embed_layer_norm_fake(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor, word: torch.Tensor, token_type: torch.Tensor | None, position: torch.Tensor,
    weight: torch.Tensor, bias: torch.Tensor, eps: float, padding_idx: int, token: torch.Tensor,
    n_rows: torch.Tensor | None, want_rows: bool, want_padded: bool, seed: torch.Tensor | None = None, site: int = 0,
    p: float = 0.0, position_padding_idx: int = -1, want_sum: bool = False,
) -> Triple:  # fmt: skip
    shape = (token.shape[0], word.shape[1])
    return tuple(word.new_empty(shape if want else 0) for want in (want_rows, want_padded, want_sum))


def _gradient(
    needs: Sequence[bool], inputs: Sequence[Any], outputs: Sequence[Any], grads: Sequence[torch.Tensor | None]
) -> Grads:
    weight, _, eps, _, token, n_rows, want_rows, want_padded, *dropout = inputs[7:18]
    dy, dy_padded = output_gradient(grads, want_rows, want_padded, token)
    if dy is None or grads[2] is not None:  # of the sum: only a second derivative has one
        return _gradient_ref(needs, inputs, outputs, grads)
    found = embed_layer_norm_backward(dy, dy_padded, _sum(outputs), weight, eps, token, n_rows, *dropout)
    return _input_gradients(needs, inputs, *found)


def _gradient_ref(
    needs: Sequence[bool], inputs: Sequence[Any], outputs: Sequence[Any], grads: Sequence[torch.Tensor | None]
) -> Grads:
    weight, bias, eps, _, token, n_rows, *wanted_and_dropout = inputs[7:18]
    n = used_rows(token, n_rows)
    args = (_sum(outputs)[:n], weight, bias, eps, token, *wanted_and_dropout)
    of_args = [True, *needs[7:9], *[False] * 7]
    dh, d_weight, d_bias, *_ = gradients_of(_normalised, args, of_args, grads[:2], torch.is_grad_enabled())
    if grads[2] is not None:
        dh = grads[2][:n] if dh is None else dh + grads[2][:n]
    if dh is None:
        return (None,) * len(inputs)
    return _input_gradients(needs, inputs, to_padded(dh, token, n), d_weight, d_bias)


def _sum(outputs: Sequence[Any]) -> torch.Tensor:
    if outputs[2].dim() < 2:
        raise RuntimeError("embed_layer_norm: called without want_sum, which its gradient reads")
    return outputs[2]


def _input_gradients(
    needs: Sequence[bool], inputs: Sequence[Any], dh: torch.Tensor, d_weight: torch.Tensor | None,
    d_bias: torch.Tensor | None,
) -> Grads:  # fmt: skip
    """Of all inputs, from that of the sum at the tokens' places."""
    ids, embeds, types, positions, word, token_type, position, *_ = inputs
    found: list[torch.Tensor | None] = [None] * len(inputs)
    found[7:9] = d_weight, d_bias
    if embeds is not None:
        found[1] = dh.view(embeds.shape).to(embeds.dtype)
    # a table that the sum did not read (word, with inputs_embeds) has no gradient
    tables = (4, ids, word, inputs[10]), (5, types, token_type, -1), (6, positions, position, inputs[18])
    for at, index, table, skipped in tables:
        if needs[at] and index is not None:
            found[at] = table_gradient(dh, index, table, skipped)
    return tuple(g if need else None for g, need in zip(found, needs, strict=True))


embed_layer_norm = register(
    "embed_layer_norm(Tensor? input_ids, Tensor? inputs_embeds, Tensor? token_type_ids, Tensor position_ids,"
    " Tensor word, Tensor? token_type, Tensor position, Tensor weight, Tensor bias, float eps, int padding_idx,"
    " Tensor token, Tensor? n_rows, bool want_rows, bool want_padded, Tensor? seed=None, int site=0, float p=0.0,"
    " int position_padding_idx=-1, bool want_sum=False) -> (Tensor, Tensor, Tensor)",
    ref=embed_layer_norm_ref,
    cpu=embed_layer_norm_cpu,
    cuda=embed_layer_norm_triton,
    fake=_embed_layer_norm_fake,
    gradient=_gradient,
    gradient_ref=_gradient_ref,
    reads={
        "input_ids": "word", "token_type_ids": "token_type", "position_ids": "position", "inputs_embeds": "",
        "word": "", "token_type": "", "position": "",
    },
    saved_outputs=(2,),
)  # fmt: skip
