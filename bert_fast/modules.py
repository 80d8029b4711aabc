"""The module tier: transformers' forward drives, and each module here runs on our ops where its own parts are plain.

It serves calls that the encoder tier leaves: a hook, an adapter, gradient checkpointing, sharded or frozen parts. Every
row is computed (the mask is an additive bias), and a module's parts that are not plain are called as they are. Whether
a module is fused is a function from the module to a reason; `explain` prints them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.models.bert import modeling_bert as hf

from bert_fast.checks import INDEX_DTYPES
from bert_fast.kernels.dropout import make_seed
from bert_fast.kernels.embed_layer_norm import embed_layer_norm
from bert_fast.kernels.gelu_layer_norm import gelu_layer_norm
from bert_fast.kernels.linear import linear
from bert_fast.kernels.linear_gelu import linear_gelu, linear_gelu_pre
from bert_fast.kernels.pool import pool
from bert_fast.kernels.qkv_linear import qkv_linear
from bert_fast.kernels.residual_layer_norm import residual_layer_norm
from bert_fast.kernels.runtime import without_autocast
from bert_fast.layer import AttendPlan, Dropout, attended, projections
from bert_fast.packing import make_packing
from bert_fast.tiers import (
    ATTENTION_IMPLEMENTATIONS,
    DTYPES,
    FORWARDS,
    activation_name,
    activation_reason,
    attention_function_reason,
    attention_shape_reason,
    autocast_reason,
    embedding_parts_reason,
    is_capture_hook,
    layer_norm_reason,
    linear_reason,
    module_reason,
    norm_parts_reason,
    surroundings_reason,
    unsupported_reason,
)
from bert_fast.training import attentions_dtype, compute_dtype, differentiable_context, dropout_rate

Tensor = torch.Tensor
Attended = tuple[Tensor, Tensor | None]


def _weight(module: nn.Module) -> Tensor | None:
    """The parameter that gives a part its dtype, device and size; None if there is no ordinary one."""
    weight = module._parameters.get("weight")
    ordinary = type(weight) in (nn.Parameter, Tensor) and weight.dtype in DTYPES
    return weight if ordinary else None


def _place_reason(cls: type, weight: Tensor | None) -> str | None:
    """Why no module of `cls` with parameters like `weight` runs on our ops."""
    if cls.forward is not FORWARDS[cls]:
        return f"is a {cls.__qualname__}, whose forward was replaced"
    if weight is None:
        return "has no ordinary weight"
    return (
        surroundings_reason()
        or unsupported_reason(weight.device)
        or autocast_reason(weight.device.type, weight.dtype)
    )


def _fits(x: Any, weight: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether an input is a tensor with elements, on the weight's device, of one of these dtypes."""
    return type(x) in (Tensor, nn.Parameter) and x.device == weight.device and x.dtype in dtypes and x.numel() > 0


def _dropout(rate: float, device: torch.device) -> Dropout:
    return Dropout(make_seed(device) if rate else None, 0, rate)


def embeddings_reason(module: nn.Module) -> str | None:
    weight = _weight(module.word_embeddings) if isinstance(module.word_embeddings, nn.Module) else None
    return _place_reason(hf.BertEmbeddings, weight) or embedding_parts_reason(module, weight)  # type: ignore[arg-type]


class BertEmbeddings(hf.BertEmbeddings):
    """Gathers, sum, LayerNorm and dropout in one launch."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values_length: int = 0,
    ) -> Tensor:
        """input_ids (B, S) or inputs_embeds (B, S, hidden); returns (B, S, hidden)."""
        inputs = input_ids, token_type_ids, position_ids, inputs_embeds, past_key_values_length
        fused = not torch.compiler.is_compiling() and embeddings_reason(self) is None
        out = _embedded(self, *inputs) if fused else None
        return super().forward(*inputs) if out is None else out


def _embedded(
    module: nn.Module, input_ids: Tensor | None, types: Tensor | None, positions: Tensor | None,
    embeds: Tensor | None, past: int,
) -> Tensor | None:  # fmt: skip
    """The embeddings on our op, None where the arguments are not what it takes."""
    word, norm = module.word_embeddings, module.LayerNorm
    table = word.weight
    if embeds is None:
        if not _fits(input_ids, table, *INDEX_DTYPES) or input_ids.dim() != 2:  # type: ignore[union-attr]
            return None
        B, S = input_ids.shape  # type: ignore[union-attr]
    else:
        if not _fits(embeds, table, table.dtype) or embeds.dim() != 3 or embeds.shape[2] != table.shape[1]:
            return None
        (B, S, _), input_ids = embeds.shape, None
    if positions is None:
        positions = module.position_ids[:, past : S + past]
    if types is None:
        types = module.token_type_ids.expand(positions.shape[0], -1).gather(1, positions.long())
    if positions.shape[-1] != S or types.shape[-1] != S:
        return None
    for ids in (types, positions):
        if not _fits(ids, table, *INDEX_DTYPES) or ids.dim() != 2 or ids.shape[0] not in (1, B):
            return None
    token = torch.arange(B * S, dtype=torch.int32, device=table.device)
    dropout = _dropout(dropout_rate(module.dropout, module.dropout), table.device)
    with without_autocast(table.device.type):
        rows, _ = embed_layer_norm(
            input_ids, embeds, types.expand(B, S), positions.expand(B, S), table,
            module.token_type_embeddings.weight, module.position_embeddings.weight, norm.weight, norm.bias, norm.eps,
            -1 if word.padding_idx is None else word.padding_idx, token, None, True, False, *dropout,
        )  # fmt: skip
    return torch.ops.aten._unsafe_view(rows, (B, S, rows.shape[1]))


def projections_reason(module: nn.Module) -> str | None:
    """Why query, key and value are called one by one; None: they are products of one and the same size."""
    weight = _weight(module.query)
    if weight is None:
        return f"query {module_reason(module.query, nn.Linear) or 'has no ordinary weight'}"
    hidden = weight.shape[1]
    for name in ("query", "key", "value"):
        reason = linear_reason(getattr(module, name), hidden, module.all_head_size, weight)
        if reason is not None:
            return f"{name} {reason}"
    return None


def self_attention_reason(module: nn.Module) -> str | None:
    """Why the attention itself is not fused; the projections may still be called one by one."""
    if module.config._attn_implementation not in ATTENTION_IMPLEMENTATIONS:
        return f"attn_implementation={module.config._attn_implementation!r} was chosen"
    return (
        _place_reason(hf.BertSelfAttention, _any_weight(module))
        or attention_shape_reason(module)
        or attention_function_reason()
    )


def _any_weight(module: nn.Module) -> Tensor | None:
    """A floating-point parameter of a module, for its device and dtype."""
    return next((p for p in module.parameters() if p.is_floating_point() and p.dtype in DTYPES), None)


def self_attention(
    module: nn.Module, hidden: Tensor, mask: Tensor | None, past: Any, want_probs: bool, kwargs: dict[str, Any]
) -> Attended | None:  # fmt: skip
    """(context, weights or None) of a BertSelfAttention on our ops, None where it is not for them.

    want_probs: the call asked for weights; a hook on an eager module sees them too, as upstream's does.
    """
    if self_attention_reason(module) is not None or past is not None or kwargs.get("is_causal"):
        return None
    like = _any_weight(module)
    assert like is not None
    if not _fits(hidden, like, like.dtype) or hidden.dim() != 3:
        return None
    (B, S, _), heads = hidden.shape, module.num_attention_heads
    if mask is not None:
        if type(mask) not in (Tensor, nn.Parameter) or mask.dim() != 4:
            return None
        if any(n not in (1, want) for n, want in zip(mask.shape, (B, heads, S, S), strict=True)):
            return None
        if mask.dtype != torch.bool and not mask.is_floating_point():
            return None
        if mask.stride(2) == 0:  # one row of keys for all queries
            mask = mask[:, :, :1]
    eager, device = module.config._attn_implementation == "eager", hidden.device
    want_probs = want_probs or (eager and not all(map(is_capture_hook, module._forward_hooks.values())))
    dtype = compute_dtype(device.type, like.dtype)
    if projections_reason(module) is None:
        qkv = None
    else:
        parts = [part(hidden) for part in (module.query, module.key, module.value)]
        dtype = parts[0].dtype
        if dtype not in DTYPES or any(x.shape != (B, S, module.all_head_size) or x.dtype != dtype for x in parts):
            return None  # an error in upstream's code too
        qkv = torch.cat(parts, -1).view(B * S, -1)
    with without_autocast(device.type):
        if qkv is None:
            rows = hidden.reshape(B * S, -1).to(dtype)
            qkv = qkv_linear(rows, *(x.to(dtype) for x in projections(module)), None)
        packing = make_packing(mask, B, S, device, False, eager)
        dropout = _dropout(dropout_rate(module, module.dropout), device)
        plan = AttendPlan(packing, heads, module.scaling, eager, dropout, dtype)
        context, probs, _ = attended(plan, qkv, packing.bias, want_probs)
        if want_probs:
            probs = probs.to(attentions_dtype(device.type, hidden.dtype, dtype, mask is not None))
            if probs.requires_grad:
                context = differentiable_context(qkv, probs, packing)
    return torch.ops.aten._unsafe_view(context, (B, S, context.shape[1])), probs if want_probs else None


def output_reason(module: nn.Module) -> str | None:
    """Why dropout, residual and LayerNorm of a BertSelfOutput or BertOutput are not one launch; its dense is called."""
    weight = _weight(module.LayerNorm)
    return _place_reason(_output_class(module), weight) or norm_parts_reason(module, weight.shape[0], weight)  # type: ignore[union-attr, arg-type]


def _output_class(module: nn.Module) -> type:
    return hf.BertSelfOutput if isinstance(module, hf.BertSelfOutput) else hf.BertOutput


def _normed(module: nn.Module, hidden: Tensor, residual: Tensor) -> Tensor | None:
    """LayerNorm(dropout(hidden) + residual) on our op, None where the tensors do not fit it."""
    norm, shape = module.LayerNorm, residual.shape
    weight = norm.weight
    if not _fits(residual, weight, weight.dtype) or hidden.shape != shape or shape[-1] != weight.shape[0]:
        return None
    if not _fits(hidden, weight, weight.dtype, compute_dtype(hidden.device.type, weight.dtype)):
        return None
    dropout = _dropout(dropout_rate(module.dropout, module.dropout), hidden.device)
    with without_autocast(hidden.device.type):
        rows, _ = residual_layer_norm(
            hidden.reshape(-1, shape[-1]), residual.reshape(-1, shape[-1]), weight, norm.bias, norm.eps, None, None,
            True, False, *dropout,
        )  # fmt: skip
    return torch.ops.aten._unsafe_view(rows, shape)


def _output_forward(self: nn.Module, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """hidden_states (B, S, hidden or intermediate), input_tensor the residual, (B, S, hidden)."""
    if torch.compiler.is_compiling() or output_reason(self) is not None:
        return _output_class(self).forward(self, hidden_states, input_tensor)
    hidden = self.dense(hidden_states)
    out = _normed(self, hidden, input_tensor)
    return self.LayerNorm(self.dropout(hidden) + input_tensor) if out is None else out


class BertSelfOutput(hf.BertSelfOutput):
    """The dense as it is; dropout, residual and LayerNorm in one launch."""

    forward = _output_forward


class BertOutput(hf.BertOutput):
    """The dense as it is; dropout, residual and LayerNorm in one launch."""

    forward = _output_forward


def intermediate_reason(module: nn.Module) -> str | None:
    weight = _weight(module.dense)
    return (
        _place_reason(hf.BertIntermediate, weight)
        or linear_reason(module.dense, weight.shape[1], weight.shape[0], weight)  # type: ignore[union-attr]
        or activation_reason(module.intermediate_act_fn)
    )


class BertIntermediate(hf.BertIntermediate):
    """Dense, bias and activation in one launch."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., hidden); returns (..., intermediate)."""
        if torch.compiler.is_compiling() or intermediate_reason(self) is not None:
            return super().forward(hidden_states)
        weight, shape = self.dense.weight, hidden_states.shape
        dtype = compute_dtype(weight.device.type, weight.dtype)
        if not _fits(hidden_states, weight, weight.dtype, dtype) or shape[-1] != weight.shape[1]:
            return super().forward(hidden_states)
        act = activation_name(self.intermediate_act_fn)
        with without_autocast(weight.device.type):
            rows = hidden_states.reshape(-1, shape[-1]).to(dtype)
            args = rows, weight.to(dtype), self.dense.bias.to(dtype), None, act
            rows = linear_gelu_pre(*args)[0] if torch.is_grad_enabled() else linear_gelu(*args)
        return torch.ops.aten._unsafe_view(rows, (*shape[:-1], rows.shape[1]))


def pooler_reason(module: nn.Module) -> str | None:
    weight = _weight(module.dense)
    return (
        _place_reason(hf.BertPooler, weight)
        or linear_reason(module.dense, weight.shape[1], weight.shape[0], weight)  # type: ignore[union-attr]
        or module_reason(module.activation, nn.Tanh)
    )


class BertPooler(hf.BertPooler):
    """First token, dense, bias and tanh in one launch."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (B, S, hidden); returns (B, hidden)."""
        if torch.compiler.is_compiling() or pooler_reason(self) is not None:
            return super().forward(hidden_states)
        weight = self.dense.weight
        dtype = compute_dtype(weight.device.type, weight.dtype)
        fits = _fits(hidden_states, weight, weight.dtype, dtype) and hidden_states.dim() == 3
        if not fits or hidden_states.shape[2] != weight.shape[1]:
            return super().forward(hidden_states)
        with without_autocast(weight.device.type):
            first = hidden_states if hidden_states.dtype == dtype else hidden_states[:, :1].to(dtype)
            first = first if first.stride(2) == 1 else first[:, :1].contiguous()
            return pool(first, weight.to(dtype), self.dense.bias.to(dtype))


def transform_reason(module: nn.Module) -> str | None:
    """Why a BertPredictionHeadTransform runs transformers' code."""
    weight = _weight(module.dense)
    if weight is not None and weight.is_floating_point() and weight.device.type in ("cpu", "cuda"):
        if torch.is_autocast_enabled(weight.device.type):
            return "autocast is on"
    return (
        _place_reason(hf.BertPredictionHeadTransform, weight)
        or linear_reason(module.dense, weight.shape[1], weight.shape[1], weight)  # type: ignore[union-attr]
        or activation_reason(module.transform_act_fn)
        or layer_norm_reason(module.LayerNorm, weight.shape[1], weight)  # type: ignore[union-attr]
    )


class BertPredictionHeadTransform(hf.BertPredictionHeadTransform):
    """The masked-LM head's dense, activation and LayerNorm: two launches."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., hidden); returns the same shape."""
        if torch.compiler.is_compiling() or transform_reason(self) is not None:
            return super().forward(hidden_states)
        weight, norm = self.dense.weight, self.LayerNorm
        if not _fits(hidden_states, weight, weight.dtype) or hidden_states.shape[-1] != weight.shape[1]:
            return super().forward(hidden_states)
        rows = hidden_states.reshape(-1, hidden_states.shape[-1]).contiguous()
        rows = linear(rows, weight, self.dense.bias, None)
        act = activation_name(self.transform_act_fn)
        rows = gelu_layer_norm(rows, norm.weight, norm.bias, norm.eps, act)
        return torch.ops.aten._unsafe_view(rows, hidden_states.shape)


REASONS: dict[type, Callable[[nn.Module], str | None]] = {
    hf.BertEmbeddings: embeddings_reason,
    hf.BertSelfAttention: self_attention_reason,
    hf.BertSelfOutput: output_reason,
    hf.BertIntermediate: intermediate_reason,
    hf.BertOutput: output_reason,
    hf.BertPooler: pooler_reason,
    hf.BertPredictionHeadTransform: transform_reason,
}
