"""The module tier: transformers' forward drives, and each module here runs on our ops where its own parts are plain.

It serves calls that the encoder tier leaves: a hook, an adapter, gradient checkpointing, sharded or frozen parts. Every
row is computed (the mask is an additive bias), and a module's parts that are not plain are called as they are. Whether
a module is fused is a function from the module to a reason, its `fused_reason`; `explain` prints them.

The classes here are put before one of transformers' (modeling.py): `_upstream` is that one, `_family` its family, and
`_signature` the arguments of its forward, in whose place `_run` is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bert_fast.checks import INDEX_DTYPES
from bert_fast.family import Family
from bert_fast.installed import CACHE_LENGTH, INPUTS, Inputs, Signature
from bert_fast.kernels.dropout import make_seed
from bert_fast.kernels.embed_layer_norm import embed_layer_norm
from bert_fast.kernels.gelu_layer_norm import gelu_layer_norm
from bert_fast.kernels.linear import linear
from bert_fast.kernels.linear_gelu import linear_gelu, linear_gelu_pre
from bert_fast.kernels.pool import pool
from bert_fast.kernels.residual_layer_norm import residual_layer_norm
from bert_fast.kernels.runtime import unsupported_reason, without_autocast
from bert_fast.layer import Dropout
from bert_fast.surroundings import autocast_reason, surroundings_reason
from bert_fast.tiers import (
    DTYPES,
    FORWARDS,
    activation_name,
    activation_reason,
    embedding_parts_reason,
    function_reason,
    layer_norm_reason,
    linear_reason,
    module_reason,
    norm_parts_reason,
)
from bert_fast.training import compute_dtype, dropout_rate

Tensor = torch.Tensor


def ordinary_weight(module: nn.Module) -> Tensor | None:
    """The parameter that gives a part its dtype, device and size; None if there is no ordinary one."""
    weight = module._parameters.get("weight")
    ordinary = type(weight) in (nn.Parameter, Tensor) and weight.dtype in DTYPES
    return weight if ordinary else None


def place_reason(module: nn.Module, weight: Tensor | None) -> str | None:
    """Why no module of this class with parameters like `weight` runs on our ops."""
    cls = module._upstream
    if cls.forward is not FORWARDS.get(cls, cls.forward):
        return f"is a {cls.__qualname__}, whose forward was replaced"
    if weight is None:
        return "has no ordinary weight"
    return unsupported_reason(weight.device) or autocast_reason(weight.device.type, weight.dtype)


class FusedModule:
    """What the classes here have in common. Each says why its parts are not plain, and what it does with a call."""

    _family: Family
    _signature: Signature
    _upstream: type
    _parts_reason: Callable[[Any], str | None]
    _fused: Callable[..., Any]  # (args, kwargs) -> the result on our ops, None where they are not what these take

    @staticmethod
    def fused_reason(module: Any) -> str | None:
        """Why a call of this module runs transformers' code, whatever its arguments."""
        return surroundings_reason() or module._family.difference() or type(module)._parts_reason(module)

    def _run(self, upstream: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        fused = not torch.compiler.is_compiling() and self.fused_reason(self) is None
        out = self._fused(args, kwargs) if fused else None
        return self._unfused(upstream, args, kwargs) if out is None else out

    def _unfused(self, upstream: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return upstream(*args, **kwargs)


def fits(x: Any, weight: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether an input is a tensor with elements, on the weight's device, of one of these dtypes."""
    return type(x) in (Tensor, nn.Parameter) and x.device == weight.device and x.dtype in dtypes and x.numel() > 0


def drawn_dropout(rate: float, device: torch.device) -> Dropout:
    return Dropout(make_seed(device) if rate else None, 0, rate)


def embeddings_reason(module: nn.Module) -> str | None:
    weight = ordinary_weight(module.word_embeddings) if isinstance(module.word_embeddings, nn.Module) else None
    return place_reason(module, weight) or embedding_parts_reason(module, weight)  # type: ignore[arg-type]


class Embeddings(FusedModule):
    """Gathers, sum, LayerNorm and dropout in one launch."""

    _parts_reason = staticmethod(embeddings_reason)

    def _fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        given = self._signature.bind(args, kwargs)
        return None if given is None or embeddings_call_reason(self, given) else _embedded(self, given)


def embeddings_call_reason(module: Any, given: dict[str, Any]) -> str | None:
    """What about the arguments of a call, by role, needs transformers' code."""
    signature, family, table = module._signature, module._family, module.word_embeddings.weight
    unserved = signature.unserved(given, signature.inputs | {CACHE_LENGTH})
    if unserved is not None:
        return f"argument {unserved!r} is left to transformers"
    past, inputs = given.get(CACHE_LENGTH, 0), Inputs(*map(given.get, INPUTS))
    first = _embedded_from(module, inputs)
    if first is inputs.inputs_embeds:
        if not fits(first, table, table.dtype) or first.dim() != 3 or first.shape[2] != table.shape[1]:
            return f"{INPUTS.inputs_embeds} is not what the table holds"
    elif not fits(first, table, *INDEX_DTYPES) or first.dim() != 2:
        return f"{INPUTS.input_ids} is no (B, S) of integers"
    B, S = first.shape[:2]
    if inputs.position_ids is None and past and family.position_padding:
        return f"{signature.spelled.get(CACHE_LENGTH, CACHE_LENGTH)} is {past}"
    if inputs.position_ids is None and not family.position_padding and past + S > module.position_ids.shape[1]:
        return f"{past + S} positions are more than the buffer holds"
    for name, ids in ((INPUTS.token_type_ids, inputs.token_type_ids), (INPUTS.position_ids, inputs.position_ids)):
        if ids is not None and not (fits(ids, table, *INDEX_DTYPES) and ids.shape in ((1, S), (B, S))):
            return f"{name} is no (B, S) of integers"
    return None


def _embedded_from(module: Any, inputs: Inputs) -> Any:
    """Ids or embeddings, of which DistilBERT takes the ids where both are given, and BERT the embeddings."""
    ids, embeds = inputs.input_ids, inputs.inputs_embeds
    return ids if embeds is None or (ids is not None and module._family.ids_before_embeds) else embeds


def _embedded(module: Any, given: dict[str, Any]) -> Tensor:
    """The embeddings on our op, (B, S, size)."""
    inputs, past = Inputs(*map(given.get, INPUTS)), given.get(CACHE_LENGTH, 0)
    given_ids, _, types, positions, embeds = inputs
    first = _embedded_from(module, inputs)
    input_ids, embeds = (None, first) if first is embeds else (first, None)
    B, S = first.shape[:2]
    word, norm, table = module.word_embeddings, module.LayerNorm, module.word_embeddings.weight
    if positions is None and module._family.position_padding:
        positions = module._family.positions(module, given_ids, embeds)
    elif positions is None:
        positions = module.position_ids[:, past : S + past]
    type_table = getattr(module, "token_type_embeddings", None)
    if types is None and type_table is not None:
        types = module.token_type_ids.expand(positions.shape[0], -1).gather(1, positions.long())
    token = torch.arange(B * S, dtype=torch.int32, device=table.device)
    dropout = drawn_dropout(dropout_rate(module.dropout, module.dropout), table.device)
    position = module.position_embeddings
    table = table if embeds is None else table.detach()  # not read: no part of the graph, as upstream
    with without_autocast(table.device.type):
        rows, *_ = embed_layer_norm(
            input_ids, embeds, None if types is None else types.expand(B, S), positions.expand(B, S), table,
            None if type_table is None else type_table.weight, position.weight, norm.weight, norm.bias, norm.eps,
            -1 if word.padding_idx is None else word.padding_idx, token, None, True, False, *dropout,
            -1 if position.padding_idx is None else position.padding_idx, torch.is_grad_enabled(),
        )  # fmt: skip
    return torch.ops.aten._unsafe_view(rows, (B, S, rows.shape[1]))


def output_reason(module: nn.Module) -> str | None:
    """Why dropout, residual and LayerNorm after a projection are not one launch; its dense is called."""
    weight = ordinary_weight(module.LayerNorm)
    return place_reason(module, weight) or norm_parts_reason(module, weight.shape[0], weight)  # type: ignore[union-attr, arg-type]


def _normed(module: nn.Module, hidden: Tensor, residual: Tensor) -> Tensor | None:
    """LayerNorm(dropout(hidden) + residual) on our op, None where the tensors do not fit it."""
    norm = module.LayerNorm
    weight = norm.weight
    if not fits(residual, weight, weight.dtype):
        return None
    shape = residual.shape
    if hidden.shape != shape or shape[-1] != weight.shape[0]:
        return None
    if not fits(hidden, weight, weight.dtype, compute_dtype(hidden.device.type, weight.dtype)):
        return None
    dropout = drawn_dropout(dropout_rate(module.dropout, module.dropout), hidden.device)
    with without_autocast(hidden.device.type):
        rows, _ = residual_layer_norm(
            hidden.reshape(-1, shape[-1]), residual.reshape(-1, shape[-1]), weight, norm.bias, norm.eps, None, None,
            True, False, *dropout,
        )  # fmt: skip
    return torch.ops.aten._unsafe_view(rows, shape)


class Output(FusedModule):
    """The dense as it is; dropout, residual and LayerNorm in one launch."""

    _parts_reason = staticmethod(output_reason)

    def _fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Of hidden (B, S, hidden or intermediate) and the residual (B, S, hidden)."""
        given = self._signature.first(2, args, kwargs)
        if given is None:
            return None
        hidden, residual = self.dense(given[0]), given[1]
        out = _normed(self, hidden, residual)
        return self.LayerNorm(self.dropout(hidden) + residual) if out is None else out


def _activated_reason(module: nn.Module, dense: nn.Module, act: nn.Module) -> str | None:
    """Why a dense and its activation are not one launch."""
    weight = ordinary_weight(dense)
    return (
        place_reason(module, weight)
        or linear_reason(dense, weight.shape[1], weight.shape[0], weight)  # type: ignore[union-attr]
        or activation_reason(act)
    )


def activated(dense: nn.Linear, act: nn.Module, hidden: Tensor) -> Tensor | None:
    """act(dense(hidden)), None where hidden (..., size) does not fit."""
    weight, shape = dense.weight, hidden.shape
    dtype = compute_dtype(weight.device.type, weight.dtype)
    if not fits(hidden, weight, weight.dtype, dtype) or shape[-1] != weight.shape[1]:
        return None
    with without_autocast(weight.device.type):
        rows = hidden.reshape(-1, shape[-1]).to(dtype)
        args = rows, weight.to(dtype), dense.bias.to(dtype), None, activation_name(act)
        rows = linear_gelu_pre(*args)[0] if torch.is_grad_enabled() else linear_gelu(*args)
    return torch.ops.aten._unsafe_view(rows, (*shape[:-1], rows.shape[1]))


def intermediate_reason(module: nn.Module) -> str | None:
    return _activated_reason(module, module.dense, module.intermediate_act_fn)


class Intermediate(FusedModule):
    """Dense, bias and activation in one launch."""

    _parts_reason = staticmethod(intermediate_reason)

    def _fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Of hidden (..., hidden); returns (..., intermediate)."""
        given = self._signature.first(1, args, kwargs)
        return None if given is None else activated(self.dense, self.intermediate_act_fn, *given)


def feed_forward_reason(module: nn.Module) -> str | None:
    if module.chunk_size_feed_forward:
        return f"chunks its feed-forward by {module.chunk_size_feed_forward}"
    if "ff_chunk" in module.__dict__ or function_reason(module._family):
        return "has a replaced ff_chunk"
    return _activated_reason(module, module.lin1, module.activation)


class FeedForward(FusedModule):
    """DistilBERT's: the first dense, bias and activation in one launch; the second and its dropout as they are."""

    _parts_reason = staticmethod(feed_forward_reason)

    def _fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Of one tensor (..., hidden); returns the same shape."""
        given = self._signature.first(1, args, kwargs)
        wide = None if given is None else activated(self.lin1, self.activation, *given)
        return None if wide is None else self.dropout(self.lin2(wide))


def pooler_reason(module: nn.Module) -> str | None:
    weight = ordinary_weight(module.dense)
    return (
        place_reason(module, weight)
        or linear_reason(module.dense, weight.shape[1], weight.shape[0], weight)  # type: ignore[union-attr]
        or module_reason(module.activation, nn.Tanh)
    )


class Pooler(FusedModule):
    """First token, dense, bias and tanh in one launch."""

    _parts_reason = staticmethod(pooler_reason)

    def _fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Of hidden (B, S, hidden); returns (B, hidden)."""
        given, weight = self._signature.first(1, args, kwargs), self.dense.weight
        dtype = compute_dtype(weight.device.type, weight.dtype)
        if given is None or not fits(given[0], weight, weight.dtype, dtype):
            return None
        hidden = given[0]
        if hidden.dim() != 3 or hidden.shape[2] != weight.shape[1]:
            return None
        with without_autocast(weight.device.type):
            first = hidden if hidden.dtype == dtype else hidden[:, :1].to(dtype)
            first = first if first.stride(2) == 1 else first[:, :1].contiguous()
            return pool(first, weight.to(dtype), self.dense.bias.to(dtype))


def transform_reason(module: nn.Module) -> str | None:
    """Why the transform of a masked-LM head runs transformers' code."""
    weight = ordinary_weight(module.dense)
    if weight is not None and weight.is_floating_point() and weight.device.type in ("cpu", "cuda"):
        if torch.is_autocast_enabled(weight.device.type):
            return "autocast is on"
    return (
        place_reason(module, weight)
        or linear_reason(module.dense, weight.shape[1], weight.shape[1], weight)  # type: ignore[union-attr]
        or activation_reason(module.transform_act_fn)
        or layer_norm_reason(module.LayerNorm, weight.shape[1], weight)  # type: ignore[union-attr]
    )


class Transform(FusedModule):
    """The masked-LM head's dense, activation and LayerNorm: two launches."""

    _parts_reason = staticmethod(transform_reason)

    def _fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Of hidden (..., hidden); returns the same shape."""
        given, weight, norm = self._signature.first(1, args, kwargs), self.dense.weight, self.LayerNorm
        if given is None or not fits(given[0], weight, weight.dtype) or given[0].shape[-1] != weight.shape[1]:
            return None
        hidden = given[0]
        rows = hidden.reshape(-1, hidden.shape[-1]).contiguous()
        rows = linear(rows, weight, self.dense.bias, None)
        act = activation_name(self.transform_act_fn)
        rows = gelu_layer_norm(rows, norm.weight, norm.bias, norm.eps, act)
        return torch.ops.aten._unsafe_view(rows, hidden.shape)
