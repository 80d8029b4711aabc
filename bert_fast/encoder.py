"""The encoder tier: embeddings to pooler on packed rows, seven ops a layer, no mask and no padding in between.

A layer: qkv_linear, attention, linear, residual_layer_norm, linear_gelu, linear, residual_layer_norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from bert_fast.kernels.attention import attention
from bert_fast.kernels.embed_layer_norm import embed_layer_norm
from bert_fast.kernels.linear import linear
from bert_fast.kernels.linear_gelu import linear_gelu
from bert_fast.kernels.pool import pool
from bert_fast.kernels.qkv_linear import qkv_linear
from bert_fast.kernels.residual_layer_norm import residual_layer_norm
from bert_fast.packing import Packing
from bert_fast.tiers import activation_name


@dataclass
class Encoded:
    """last (B, S, hidden); pooled (B, hidden) or None; hidden: embeddings and every layer; attentions: every layer."""

    last: torch.Tensor
    pooled: torch.Tensor | None
    hidden: list[torch.Tensor]
    attentions: list[torch.Tensor]


def _on_path(rows: torch.Tensor, padded: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Rows read back from the padded tensor that the user holds, so that gradients flow through that very tensor."""
    if packing.identity:
        return padded.view(rows.shape)
    return padded.view(rows.shape).index_select(0, packing.token)


def _padded(rows: torch.Tensor, packing: Packing) -> torch.Tensor:
    """(T, hidden) as (B, S, hidden); no view to autograd, which forbids some in-place changes of views to the user."""
    return torch.ops.aten._unsafe_view(rows, (packing.B, packing.S, rows.shape[1]))


def _embed(
    embeddings: nn.Module,
    packing: Packing,
    input_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    want_padded: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    B, S = packing.B, packing.S
    if token_type_ids is None and position_ids is None:
        token_type_ids = embeddings.token_type_ids[:, :S]
    elif token_type_ids is None:  # as upstream: a gather by position from a buffer of zeros
        buffer = embeddings.token_type_ids.expand(position_ids.shape[0], -1)
        token_type_ids = buffer.gather(1, position_ids.long().clamp(0, buffer.shape[1] - 1))
    if position_ids is None:
        position_ids = embeddings.position_ids[:, :S]
    word, norm = embeddings.word_embeddings, embeddings.LayerNorm
    return embed_layer_norm(
        input_ids, inputs_embeds, token_type_ids.expand(B, S), position_ids.expand(B, S),
        word.weight, embeddings.token_type_embeddings.weight, embeddings.position_embeddings.weight,
        norm.weight, norm.bias, norm.eps, -1 if word.padding_idx is None else word.padding_idx,
        packing.token, packing.n_rows, True, want_padded and not packing.identity,
    )  # fmt: skip


def _differentiable_context(qkv: torch.Tensor, probs: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Context (T, hidden) computed from the returned probabilities, so that they carry gradient as in eager."""
    B, heads, S, _ = probs.shape
    v = qkv[:, 2 * qkv.shape[1] // 3 :]
    if packing.n_rows is not None:  # 0 * undefined rows may be NaN
        v = torch.where((torch.arange(v.shape[0], device=v.device) < packing.n_rows)[:, None], v, 0.0)
    if not packing.identity:
        v = torch.zeros_like(v).index_copy(0, packing.token.long(), v)
    context = probs @ v.view(B, S, heads, -1).transpose(1, 2)
    context = context.transpose(1, 2).reshape(B * S, -1)
    return context if packing.identity else context.index_select(0, packing.token)


def encode(
    model: nn.Module,
    packing: Packing,
    input_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    want_hidden: bool,
    want_attentions: bool,
) -> Encoded:
    """Run a BertModel whose modules are plain (tiers.model_reason is None) on checked inputs."""
    p, layers = packing, model.encoder.layer
    uniform_empty = model.config._attn_implementation == "eager"
    # a returned hidden state must lie on the gradient's path only when there is a gradient
    through_returned = torch.is_grad_enabled()
    rows, padded = _embed(
        model.embeddings, p, input_ids, token_type_ids, position_ids, inputs_embeds, want_hidden
    )
    hidden: list[torch.Tensor] = []
    attentions: list[torch.Tensor] = []

    def keep(rows: torch.Tensor, padded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        padded = _padded(rows if p.identity else padded, p)
        return (_on_path(rows, padded, p) if through_returned and want_hidden else rows), padded

    if want_hidden:
        rows, padded = keep(rows, padded)
        hidden.append(padded)
    for i, layer in enumerate(layers):
        own, out, inter, ffn = layer.attention.self, layer.attention.output, layer.intermediate, layer.output
        qkv = qkv_linear(
            rows, own.query.weight, own.key.weight, own.value.weight, own.query.bias, own.key.bias, own.value.bias,
            p.n_rows,
        )  # fmt: skip
        context, probs, _ = attention(
            qkv, p.bias, p.token, p.cu_seqlens, p.kv_len, p.prefix, own.num_attention_heads, own.scaling,
            want_attentions, uniform_empty,
        )  # fmt: skip
        if want_attentions:
            attentions.append(probs)
            if through_returned and probs.requires_grad:
                context = _differentiable_context(qkv, probs, p)
        projected = linear(context, out.dense.weight, out.dense.bias, p.n_rows)
        norm = out.LayerNorm
        attended, _ = residual_layer_norm(
            projected, rows, norm.weight, norm.bias, norm.eps, None, p.n_rows, True, False
        )
        act = activation_name(inter.intermediate_act_fn)
        wide = linear_gelu(attended, inter.dense.weight, inter.dense.bias, p.n_rows, act)
        projected = linear(wide, ffn.dense.weight, ffn.dense.bias, p.n_rows)
        norm, is_last = ffn.LayerNorm, i + 1 == len(layers)
        want_padded = not p.identity and (is_last or want_hidden)
        rows, padded = residual_layer_norm(
            projected, attended, norm.weight, norm.bias, norm.eps, p.token if want_padded else None, p.n_rows,
            p.identity or not is_last, want_padded,
        )  # fmt: skip
        if want_hidden and not is_last:
            rows, padded = keep(rows, padded)
            hidden.append(padded)
    last = _padded(rows if p.identity else padded, p)
    if want_hidden:
        hidden.append(last)
    pooler = model.pooler
    pooled = None if pooler is None else pool(last, pooler.dense.weight, pooler.dense.bias)
    return Encoded(last, pooled, hidden, attentions)
