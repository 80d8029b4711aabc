"""The encoder tier for inference: embeddings to pooler on packed rows, five ops a layer, no mask, no padding between.

A layer: qkv_linear, attention, linear_layer_norm, linear_gelu, linear_layer_norm. Where only the first tokens are read,
the last layer has keys and values of all rows, but queries and everything after of the first tokens alone. Dropout,
gradients and autocast are in training.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bert_fast.family import EmbeddingsView, LayerView, ModelView
from bert_fast.kernels.attention import attention
from bert_fast.kernels.embed_layer_norm import embed_layer_norm
from bert_fast.kernels.first_rows import first_rows
from bert_fast.kernels.first_token_attention import first_token_attention
from bert_fast.kernels.linear import linear
from bert_fast.kernels.linear_gelu import linear_gelu
from bert_fast.kernels.linear_layer_norm import linear_layer_norm
from bert_fast.kernels.pool import pool
from bert_fast.kernels.qkv_linear import qkv_linear
from bert_fast.packing import Packing
from bert_fast.tiers import activation_name


@dataclass
class Encoded:
    """last (B, S, hidden), or (B, 1, hidden) where only the first tokens are read; pooled (B, hidden) or None;

    hidden: embeddings and every layer; attentions: every layer.
    """

    last: torch.Tensor
    pooled: torch.Tensor | None
    hidden: list[torch.Tensor]
    attentions: list[torch.Tensor]


def _padded(rows: torch.Tensor, packing: Packing) -> torch.Tensor:
    """(T, hidden) as (B, S, hidden); no view to autograd, which forbids some in-place changes of views to the user."""
    return torch.ops.aten._unsafe_view(rows, (packing.B, packing.S, rows.shape[1]))


def _embed(
    view: EmbeddingsView,
    packing: Packing,
    input_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    want_rows: bool,
    want_padded: bool,
    dropout: tuple[torch.Tensor | None, int, float] = (None, 0, 0.0),
    has_backward: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, padded), before `project`. dropout: seed, site and probability."""
    B, S = packing.B, packing.S
    module, word, position, types, norm = view[:5]
    if position_ids is None and view.positions is not None:
        position_ids = view.positions(input_ids, inputs_embeds)
    if types is None:
        token_type_ids = None
    elif token_type_ids is None and position_ids is None:
        token_type_ids = module.token_type_ids[:, :S]
        # backward reads them, and DDP writes into buffers before every forward: upstream gathers them into a tensor
        token_type_ids = token_type_ids.clone() if has_backward else token_type_ids
    elif token_type_ids is None:  # as upstream: a gather by position from a buffer of zeros
        buffer = module.token_type_ids.expand(position_ids.shape[0], -1)
        at = position_ids.long()
        outside = (at < 0) | (at >= buffer.shape[1])  # on a GPU, where nobody has looked: no type, a row of NaN
        token_type_ids = buffer.gather(1, at.masked_fill(outside, 0)).masked_fill(outside, -1)
    if position_ids is None:
        position_ids = module.position_ids[:, :S]
    words = word.weight if inputs_embeds is None else word.weight.detach()  # which is not read then: no part of a graph
    return embed_layer_norm(
        input_ids, inputs_embeds, None if token_type_ids is None else token_type_ids.expand(B, S),
        position_ids.expand(B, S), words, None if types is None else types.weight, position.weight,
        norm.weight, norm.bias, norm.eps, -1 if word.padding_idx is None else word.padding_idx,
        packing.token, packing.n_rows, want_rows, want_padded, *dropout,
        -1 if position.padding_idx is None else position.padding_idx, has_backward,
    )[:2]  # fmt: skip


def _first_rows(
    view: EmbeddingsView, packing: Packing, inputs: tuple[torch.Tensor | None, ...], want_hidden: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, padded) that enter the first layer; padded where hidden states are wanted and rows are not tokens."""
    want_padded = want_hidden and not packing.identity
    rows, padded = _embed(view, packing, *inputs, True, want_padded and view.project is None)
    if view.project is not None:
        rows = linear(rows, view.project.weight, view.project.bias, packing.n_rows)
        padded = _to_padded(rows, packing) if want_padded else padded
    return rows, padded


def _to_padded(rows: torch.Tensor, packing: Packing) -> torch.Tensor:
    """(T, hidden) rows in the order of the tokens, zeros where a token is no row."""
    if packing.n_rows is not None:  # what is no row is undefined
        is_row = torch.arange(rows.shape[0], device=rows.device) < packing.n_rows
        rows = torch.where(is_row[:, None], rows, 0.0)
    return torch.empty_like(rows).index_copy(0, packing.token.long(), rows)


def _attend(
    layer: LayerView, qkv: torch.Tensor, p: Packing, want_attentions: bool, uniform_empty: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(context, probabilities) of one layer's self-attention."""
    return attention(
        qkv, p.bias, p.token, p.cu_seqlens, p.kv_len, p.prefix, layer.heads, layer.scale,
        want_attentions, uniform_empty,
    )[:2]  # fmt: skip


def _encoded(
    view: ModelView, last: torch.Tensor, hidden: list[torch.Tensor], attentions: list[torch.Tensor], want_hidden: bool
) -> Encoded:
    """The outputs put together; `hidden` lacks the last layer's."""
    if want_hidden:
        hidden.append(last)
    pooler = view.pooler
    pooled = None if pooler is None else pool(last, pooler.weight, pooler.bias)
    return Encoded(last, pooled, hidden, attentions)


def _after_attention(
    layer: LayerView,
    context: torch.Tensor,
    rows: torch.Tensor,
    token: torch.Tensor | None,
    n_rows: torch.Tensor | None,
    want_rows: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output projection and feed-forward of one layer: (rows, padded), the latter where there is a token map."""
    dense, norm, up, down = layer.attention_dense, layer.attention_norm, layer.up, layer.down
    attended, _ = linear_layer_norm(
        context, dense.weight, dense.bias, rows, norm.weight, norm.bias, norm.eps, None, n_rows, True, False
    )
    wide = linear_gelu(attended, up.weight, up.bias, n_rows, activation_name(layer.act))
    norm = layer.norm
    return linear_layer_norm(
        wide, down.weight, down.bias, attended, norm.weight, norm.bias, norm.eps, token, n_rows, want_rows,
        token is not None,
    )  # fmt: skip


def _first_tokens(layer: LayerView, rows: torch.Tensor, p: Packing, uniform_empty: bool) -> torch.Tensor:
    """(B, hidden): the output of a last layer whose only readers are those of the first tokens."""
    first = first_rows(rows, p.token, p.cu_seqlens, p.kv_len)
    query = linear(first, layer.query.weight, layer.query.bias, None)
    kv = qkv_linear(
        rows, None, layer.key.weight, layer.value.weight, None, layer.key.bias, layer.value.bias, p.n_rows
    )  # fmt: skip
    context = first_token_attention(
        query, kv, p.cu_seqlens, p.kv_len, layer.heads, layer.scale, uniform_empty
    )
    return _after_attention(layer, context, first, None, None, True)[0]


def encode(
    view: ModelView,
    packing: Packing,
    input_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    want_hidden: bool,
    want_attentions: bool,
    first_tokens_only: bool = False,
) -> Encoded:
    """Run a model whose modules are plain (tiers.model_reason is None) on checked inputs, without dropout.

    first_tokens_only: the caller reads the pooler alone; not with hidden states, attentions or a 4-D mask.
    """
    p, layers, uniform_empty = packing, view.layers, view.uniform_empty
    inputs = input_ids, token_type_ids, position_ids, inputs_embeds
    rows, padded = _first_rows(view.embeddings, p, inputs, want_hidden)
    hidden: list[torch.Tensor] = []
    attentions: list[torch.Tensor] = []
    if want_hidden:
        hidden.append(_padded(rows if p.identity else padded, p))
    for i, layer in enumerate(layers):
        is_last = i + 1 == len(layers)
        if is_last and first_tokens_only:
            break
        qkv = qkv_linear(
            rows, layer.query.weight, layer.key.weight, layer.value.weight, layer.query.bias, layer.key.bias,
            layer.value.bias, p.n_rows,
        )  # fmt: skip
        context, probs = _attend(layer, qkv, p, want_attentions, uniform_empty)
        if want_attentions:
            attentions.append(probs)
        token = p.token if not p.identity and (is_last or want_hidden) else None
        rows, padded = _after_attention(layer, context, rows, token, p.n_rows, p.identity or not is_last)
        if want_hidden and not is_last:
            hidden.append(_padded(rows if p.identity else padded, p))
    if first_tokens_only:
        last = _first_tokens(layers[-1], rows, p, uniform_empty)[:, None]
    else:
        last = _padded(rows if p.identity else padded, p)
    return _encoded(view, last, hidden, attentions, want_hidden)
