"""The encoder tier with dropout, gradients or autocast: the packed rows of encoder.py, layers of layer.py.

Upstream's dropout has four places: after the embeddings, on the attention weights, on the outputs of both projections.
One seed is drawn for a forward; a place is one `site` of it (kernels/dropout.py).

Under autocast, products take and give its half dtype, and rows between the layers stay fp32, as transformers' do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bert_fast.encoder import Encoded, _embed, _padded, _to_padded
from bert_fast.family import LayerView, ModelView
from bert_fast.kernels.dropout import make_seed
from bert_fast.kernels.linear import linear
from bert_fast.kernels.pool import pool
from bert_fast.kernels.qkv_linear import qkv_linear
from bert_fast.kernels.runtime import without_autocast
from bert_fast.layer import Attend, AttendPlan, Dropout, after_attention, attend, layer_plan, projections
from bert_fast.packing import Packing, own_mask


def compute_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """Of the products of a model of `dtype`: autocast's where it is on, else its own."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else dtype


def attentions_dtype(device_type: str, rows: torch.dtype, products: torch.dtype, masked: bool) -> torch.dtype:
    """Of returned weights: under autocast upstream's softmax is fp32 on CUDA, and on the CPU next to an fp32 mask."""
    return rows if device_type != "cpu" or masked else products


def dropout_rate(module: nn.Module, dropout: nn.Module) -> float:
    """p of a dropout at work: `module` is whose training flag counts."""
    return float(dropout.p) if module.training else 0.0


def _rates(view: ModelView) -> list[float]:
    """p of every place, by site: embeddings; of each layer attention weights, attention output, layer output."""
    dropout = view.embeddings.dropout
    rates = [dropout_rate(dropout, dropout)]
    for layer in view.layers:
        out, ffn = layer.attention_dropout, layer.dropout
        rates.append(dropout_rate(layer.dropout_owner, layer.attention.dropout))
        rates += [0.0 if out is None else dropout_rate(out, out), dropout_rate(ffn, ffn)]
    return rates


def differentiable_context(qkv: torch.Tensor, probs: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Context (T, hidden) computed from the returned probabilities, so that they carry gradient as in eager."""
    B, heads, S, _ = probs.shape
    v = qkv[:, 2 * qkv.shape[1] // 3 :]
    if not packing.identity:
        row, sequence = torch.arange(v.shape[0], device=v.device), packing.token.long() // S
        keys = packing.kv_len[sequence]
        # 0 * what is no key, or no row, may be NaN, here and in backward; a sequence without keys has uniform weights.
        # What is finite stays: the gradient at a weight of 0 is made of it
        is_key = (row - packing.cu_seqlens[sequence] < keys) | (keys == 0)
        v = torch.where(is_key[:, None] | v.isfinite(), v, 0.0)
        v = torch.zeros_like(v).index_copy(0, packing.token.long(), v)
    context = probs.to(v.dtype) @ v.view(B, S, heads, -1).transpose(1, 2)
    context = context.transpose(1, 2).reshape(B * S, -1).contiguous()  # of heads of one number it was a view
    context = context if packing.identity else context.index_select(0, packing.token)
    return context if packing.n_rows is None else torch.where((row < packing.n_rows)[:, None], context, 0.0)


class NextRows(torch.autograd.Function):
    """(T, h) in the order of tokens, as the user holds it -> the rows of the next layer.

    The former is kept, though nothing reads it: transformers' layer would, and torch refuses where it was written into.
    """

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens, token)
        return tokens.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, d_rows: torch.Tensor) -> tuple[torch.Tensor, None]:
        _, token = ctx.saved_tensors
        return torch.zeros_like(d_rows).index_copy(0, token.long(), d_rows), None


def next_rows(tokens: torch.Tensor, p: Packing, read: bool) -> torch.Tensor:
    """The rows of the next layer, from the very tensor that the user holds, so that gradients flow through it.

    read: whether transformers' backward reads that tensor; if not, the user may write into it, and ours reads a copy.
    """
    if not p.identity:
        return NextRows.apply(tokens, p.token) if read else tokens.index_select(0, p.token)
    return tokens if read or not torch.is_grad_enabled() else tokens.clone()


def encode_training(
    view: ModelView,
    packing: Packing,
    input_ids: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    want_hidden: bool,
    want_attentions: bool,
    masked: bool,
) -> Encoded:
    """Run a model whose modules are plain (tiers.model_reason is None) on checked inputs.

    masked: a mask hides a key; the dtype of attentions, where wanted, depends on it under autocast.
    """
    device = view.embeddings.word.weight.device
    dtype = compute_dtype(device.type, view.embeddings.word.weight.dtype)
    with without_autocast(device.type):
        return _encode(
            view, packing, (input_ids, token_type_ids, position_ids, inputs_embeds), want_hidden, want_attentions,
            masked, dtype, device,
        )  # fmt: skip


def _encode(
    view: ModelView, p: Packing, inputs: tuple[torch.Tensor | None, ...], want_hidden: bool, want_attentions: bool,
    masked: bool, dtype: torch.dtype, device: torch.device,
) -> Encoded:  # fmt: skip
    rates = _rates(view)
    seed = make_seed(device) if any(rates) else None
    layers, hidden, attentions = view.layers, [], []

    def dropout(site: int) -> Dropout:
        return Dropout(seed, site, rates[site])

    def cast(parameter: torch.Tensor) -> torch.Tensor:
        return parameter.to(dtype)

    def handed_out(out: torch.Tensor, layer: LayerView) -> torch.Tensor:
        padded = _padded(out, p)
        hidden.append(padded)
        read = out.dtype == dtype and any(part.weight.requires_grad for part in layer[:3])
        return next_rows(padded.view(out.shape), p, read)

    to_tokens, project = want_hidden and not p.identity, view.embeddings.project
    has_backward = torch.is_grad_enabled()
    if view.relative_bias is None:  # else the mask was made for this call
        p = replace(p, bias=own_mask(p.bias, view.uniform_empty, min(rates[1::3])))
    if project is None:
        rows = _embed(view.embeddings, p, *inputs, not to_tokens, to_tokens, dropout(0), has_backward)[to_tokens]
    else:
        rows, _ = _embed(view.embeddings, p, *inputs, True, False, dropout(0), has_backward)
        rows = linear(rows.to(dtype), cast(project.weight), cast(project.bias), p.n_rows)
        rows = _to_padded(rows, p) if to_tokens else rows
    if want_hidden:
        rows = handed_out(rows, layers[0])
    if device.type != "cpu":  # a projection's result is half under autocast; CUDA's LayerNorm makes it fp32 again
        rows = rows.to(view.embeddings.word.weight.dtype)
    for i, layer in enumerate(layers):
        is_last, site = i + 1 == len(layers), 1 + 3 * i
        plan = AttendPlan(p, layer.heads, layer.scale, view.uniform_empty, dropout(site), dtype)
        parameters = list(map(cast, projections(layer.query, layer.key, layer.value)))
        if want_attentions:
            qkv = qkv_linear(rows.to(dtype), *parameters, p.n_rows)
            context, probs, _ = attend(plan, qkv, p.bias, True)
            probs = probs.to(attentions_dtype(device.type, rows.dtype, dtype, masked))
            attentions.append(probs)
            if probs.requires_grad:
                context = differentiable_context(qkv, probs, p)
        else:
            context, rows = Attend.apply(plan, rows, *parameters, p.bias)
        to_tokens = (is_last or want_hidden) and not p.identity
        dropouts = dropout(site + 1), dropout(site + 2)
        rows = after_attention(layer, layer_plan(layer, p, to_tokens, dropouts, dtype), cast, context, rows)
        if want_hidden and not is_last:
            rows = handed_out(rows, layers[i + 1])
    last = _padded(rows, p)
    if want_hidden:
        hidden.append(last)
    pooler = view.pooler
    pooled = None
    if pooler is not None:
        first = last if last.dtype == dtype else last[:, :1].to(dtype)
        pooled = pool(first, cast(pooler.weight), cast(pooler.bias))
    return Encoded(last, pooled, hidden, attentions)
