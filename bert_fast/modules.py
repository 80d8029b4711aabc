"""The module tier: transformers' forward drives, and each module here runs on our ops where its own parts are plain.

It serves calls that the encoder tier leaves: a hook, an adapter, gradient checkpointing, sharded or frozen parts. Every
row is computed (the mask is an additive bias), and a module's parts that are not plain are called as they are. Whether
a module is fused is a function from the module to a reason, its `fused_reason`; `explain` prints them.

The classes here are put before one of transformers' (modeling.py); `_upstream` is that one, `_family` its family.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

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
    attention_shape_reason,
    autocast_reason,
    embedding_parts_reason,
    function_reason,
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


def _place_reason(module: nn.Module, weight: Tensor | None) -> str | None:
    """Why no module of this class with parameters like `weight` runs on our ops."""
    cls = module._upstream
    if cls.forward is not FORWARDS.get(cls, cls.forward):
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
    return _place_reason(module, weight) or embedding_parts_reason(module, weight)  # type: ignore[arg-type]


class Embeddings:
    """Gathers, sum, LayerNorm and dropout in one launch."""

    fused_reason = staticmethod(embeddings_reason)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Arguments by transformers' names: input_ids (B, S) or inputs_embeds; returns (B, S, size)."""
        fused = not torch.compiler.is_compiling() and embeddings_reason(self) is None
        given = dict(zip(self._arguments, args, strict=False)) | kwargs
        out = _embedded(self, given) if fused and len(given) == len(args) + len(kwargs) else None
        return super().forward(*args, **kwargs) if out is None else out


def _embedded(module: nn.Module, given: dict[str, Any]) -> Tensor | None:
    """The embeddings on our op, None where the arguments are not what it takes."""
    names = "input_ids", "token_type_ids", "position_ids", "inputs_embeds"
    input_ids, types, positions, embeds = (given.pop(name, None) for name in names)
    past = given.pop("past_key_values_length", 0)
    if given:
        return None
    word, norm, given_ids = module.word_embeddings, module.LayerNorm, input_ids
    table = word.weight
    if embeds is None or (input_ids is not None and module._family.ids_before_embeds):
        if not _fits(input_ids, table, *INDEX_DTYPES) or input_ids.dim() != 2:
            return None
        (B, S), embeds = input_ids.shape, None
    else:
        if not _fits(embeds, table, table.dtype) or embeds.dim() != 3 or embeds.shape[2] != table.shape[1]:
            return None
        (B, S, _), input_ids = embeds.shape, None
    if positions is None and module._family.position_padding:
        if past:
            return None
        positions = module._family.positions(module, given_ids, embeds)
    elif positions is None:
        positions = module.position_ids[:, past : S + past]
    type_table = getattr(module, "token_type_embeddings", None)
    if types is None and type_table is not None:
        types = module.token_type_ids.expand(positions.shape[0], -1).gather(1, positions.long())
    for ids in (types, positions):
        if ids is None:
            continue
        if not _fits(ids, table, *INDEX_DTYPES) or ids.dim() != 2 or ids.shape[0] not in (1, B) or ids.shape[1] != S:
            return None
    token = torch.arange(B * S, dtype=torch.int32, device=table.device)
    dropout = _dropout(dropout_rate(module.dropout, module.dropout), table.device)
    position = module.position_embeddings
    with without_autocast(table.device.type):
        rows, _ = embed_layer_norm(
            input_ids, embeds, None if types is None else types.expand(B, S), positions.expand(B, S), table,
            None if type_table is None else type_table.weight, position.weight, norm.weight, norm.bias, norm.eps,
            -1 if word.padding_idx is None else word.padding_idx, token, None, True, False, *dropout,
            -1 if position.padding_idx is None else position.padding_idx,
        )  # fmt: skip
    return torch.ops.aten._unsafe_view(rows, (B, S, rows.shape[1]))


def projection_parts(module: nn.Module) -> dict[str, nn.Module]:
    """Query, key and value of an attention module, by the names of their family."""
    return {name: getattr(module, name) for name in module._family.names[1:4]}


def projections_reason(module: nn.Module) -> str | None:
    """Why query, key and value are called one by one; None: they are products of one and the same size."""
    parts = projection_parts(module)
    first, query = next(iter(parts.items()))
    weight = _weight(query)
    if weight is None:
        return f"{first} {module_reason(query, nn.Linear) or 'has no ordinary weight'}"
    for name, part in parts.items():
        reason = linear_reason(part, weight.shape[1], _size(module), weight)
        if reason is not None:
            return f"{name} {reason}"
    return None


def _size(module: nn.Module) -> int:
    """Of all heads of an attention module together."""
    return getattr(module, module._family.heads) * module.attention_head_size


def self_attention_reason(module: nn.Module) -> str | None:
    """Why the attention itself is not fused; the projections may still be called one by one."""
    if module.config._attn_implementation not in ATTENTION_IMPLEMENTATIONS:
        return f"attn_implementation={module.config._attn_implementation!r} was chosen"
    family = module._family
    heads = getattr(module, family.heads)
    return (
        _place_reason(module, _any_weight(module))
        or attention_shape_reason(module, heads, getattr(module, "all_head_size", _size(module)), family.scale(module))
        or function_reason(family)
    )


def _any_weight(module: nn.Module) -> Tensor | None:
    """A floating-point parameter of a module, for its device and dtype."""
    return next((p for p in module.parameters() if p.is_floating_point() and p.dtype in DTYPES), None)


def self_attention(
    module: nn.Module, hidden: Tensor, mask: Tensor | None, past: Any, want_probs: bool, kwargs: dict[str, Any]
) -> Attended | None:  # fmt: skip
    """(context, weights or None) of a self-attention on our ops, None where it is not for them.

    want_probs: the call asked for weights; upstream's eager has them in any case, for whoever looks.
    """
    if self_attention_reason(module) is not None or past is not None or kwargs.get("is_causal"):
        return None
    like = _any_weight(module)
    assert like is not None
    if not _fits(hidden, like, like.dtype) or hidden.dim() != 3:
        return None
    (B, S, _), heads, size = hidden.shape, getattr(module, module._family.heads), _size(module)
    if mask is not None:
        if type(mask) not in (Tensor, nn.Parameter) or mask.dim() != 4:
            return None
        if any(n not in (1, want) for n, want in zip(mask.shape, (B, heads, S, S), strict=True)):
            return None
        if mask.dtype != torch.bool and not mask.is_floating_point():
            return None
        if mask.stride(2) == 0:  # one row of keys for all queries
            mask = mask[:, :, :1]
    kind, device = module.config._attn_implementation, hidden.device
    hooked = not all(map(is_capture_hook, list(module._forward_hooks.values())))
    want_probs = want_probs or kind == "eager" or (kind != "sdpa" and hooked)  # eager always hands them on
    dtype = compute_dtype(device.type, like.dtype)
    if projections_reason(module) is None:
        qkv = None
    else:
        parts = [part(hidden) for part in projection_parts(module).values()]
        dtype = parts[0].dtype
        if dtype not in DTYPES or any(x.shape != (B, S, size) or x.dtype != dtype for x in parts):
            return None  # an error in upstream's code too
        qkv = torch.cat(parts, -1).view(B * S, -1)
    with without_autocast(device.type):
        if qkv is None:
            rows = hidden.reshape(B * S, -1).to(dtype)
            qkv = qkv_linear(rows, *(x.to(dtype) for x in projections(*projection_parts(module).values())), None)
        packing = make_packing(mask, B, S, device, False, kind != "sdpa")
        dropout = _dropout(dropout_rate(module, module.dropout), device)
        plan = AttendPlan(packing, heads, module._family.scale(module), kind != "sdpa", dropout, dtype)
        context, probs, _ = attended(plan, qkv, packing.bias, want_probs)
        if want_probs:
            probs = probs.to(attentions_dtype(device.type, hidden.dtype, dtype, mask is not None))
            if probs.requires_grad:
                context = differentiable_context(qkv, probs, packing)
    return torch.ops.aten._unsafe_view(context, (B, S, context.shape[1])), probs if want_probs else None


def output_reason(module: nn.Module) -> str | None:
    """Why dropout, residual and LayerNorm after a projection are not one launch; its dense is called."""
    weight = _weight(module.LayerNorm)
    return _place_reason(module, weight) or norm_parts_reason(module, weight.shape[0], weight)  # type: ignore[union-attr, arg-type]


def _normed(module: nn.Module, hidden: Tensor, residual: Tensor) -> Tensor | None:
    """LayerNorm(dropout(hidden) + residual) on our op, None where the tensors do not fit it."""
    norm = module.LayerNorm
    weight = norm.weight
    if not _fits(residual, weight, weight.dtype):
        return None
    shape = residual.shape
    if hidden.shape != shape or shape[-1] != weight.shape[0]:
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


class Output:
    """The dense as it is; dropout, residual and LayerNorm in one launch."""

    fused_reason = staticmethod(output_reason)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """hidden_states (B, S, hidden or intermediate), input_tensor the residual, (B, S, hidden)."""
        if torch.compiler.is_compiling() or output_reason(self) is not None:
            return super().forward(hidden_states, input_tensor)
        hidden = self.dense(hidden_states)
        out = _normed(self, hidden, input_tensor)
        return self.LayerNorm(self.dropout(hidden) + input_tensor) if out is None else out


def _activated_reason(module: nn.Module, dense: nn.Module, act: nn.Module) -> str | None:
    """Why a dense and its activation are not one launch."""
    weight = _weight(dense)
    return (
        _place_reason(module, weight)
        or linear_reason(dense, weight.shape[1], weight.shape[0], weight)  # type: ignore[union-attr]
        or activation_reason(act)
    )


def activated(dense: nn.Linear, act: nn.Module, hidden: Tensor) -> Tensor | None:
    """act(dense(hidden)), None where hidden (..., size) does not fit."""
    weight, shape = dense.weight, hidden.shape
    dtype = compute_dtype(weight.device.type, weight.dtype)
    if not _fits(hidden, weight, weight.dtype, dtype) or shape[-1] != weight.shape[1]:
        return None
    with without_autocast(weight.device.type):
        rows = hidden.reshape(-1, shape[-1]).to(dtype)
        args = rows, weight.to(dtype), dense.bias.to(dtype), None, activation_name(act)
        rows = linear_gelu_pre(*args)[0] if torch.is_grad_enabled() else linear_gelu(*args)
    return torch.ops.aten._unsafe_view(rows, (*shape[:-1], rows.shape[1]))


def intermediate_reason(module: nn.Module) -> str | None:
    return _activated_reason(module, module.dense, module.intermediate_act_fn)


class Intermediate:
    """Dense, bias and activation in one launch."""

    fused_reason = staticmethod(intermediate_reason)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., hidden); returns (..., intermediate)."""
        fused = not torch.compiler.is_compiling() and intermediate_reason(self) is None
        out = activated(self.dense, self.intermediate_act_fn, hidden_states) if fused else None
        return super().forward(hidden_states) if out is None else out


def feed_forward_reason(module: nn.Module) -> str | None:
    if module.chunk_size_feed_forward:
        return f"chunks its feed-forward by {module.chunk_size_feed_forward}"
    if "ff_chunk" in module.__dict__ or function_reason(module._family):
        return "has a replaced ff_chunk"
    return _activated_reason(module, module.lin1, module.activation)


class FeedForward:
    """DistilBERT's: the first dense, bias and activation in one launch; the second and its dropout as they are."""

    fused_reason = staticmethod(feed_forward_reason)

    def forward(self, input: Tensor) -> Tensor:
        """input (..., hidden); returns the same shape."""
        fused = not torch.compiler.is_compiling() and feed_forward_reason(self) is None
        wide = activated(self.lin1, self.activation, input) if fused else None
        return super().forward(input) if wide is None else self.dropout(self.lin2(wide))


def pooler_reason(module: nn.Module) -> str | None:
    weight = _weight(module.dense)
    return (
        _place_reason(module, weight)
        or linear_reason(module.dense, weight.shape[1], weight.shape[0], weight)  # type: ignore[union-attr]
        or module_reason(module.activation, nn.Tanh)
    )


class Pooler:
    """First token, dense, bias and tanh in one launch."""

    fused_reason = staticmethod(pooler_reason)

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
    """Why the transform of a masked-LM head runs transformers' code."""
    weight = _weight(module.dense)
    if weight is not None and weight.is_floating_point() and weight.device.type in ("cpu", "cuda"):
        if torch.is_autocast_enabled(weight.device.type):
            return "autocast is on"
    return (
        _place_reason(module, weight)
        or linear_reason(module.dense, weight.shape[1], weight.shape[1], weight)  # type: ignore[union-attr]
        or activation_reason(module.transform_act_fn)
        or layer_norm_reason(module.LayerNorm, weight.shape[1], weight)  # type: ignore[union-attr]
    )


class Transform:
    """The masked-LM head's dense, activation and LayerNorm: two launches."""

    fused_reason = staticmethod(transform_reason)

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
