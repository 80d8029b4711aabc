"""transformers' own attention modules: on our ops where they can be, else changed where tiers would disagree.

- Weights asked for per call are real under sdpa too: transformers answers with an empty tuple, because
  scaled_dot_product_attention keeps no weights. That call runs transformers' forward with its own eager function; a
  query without any key keeps sdpa's context of zeros, and has weights of zero.
- A 4-D boolean mask says which keys to keep under eager too, where transformers would add it as 0 and 1.

The shared config is not touched, so threads cannot disturb each other. As in modules.py, the classes here are put
before one of transformers', and what they know of a call they know from its signature as it is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from bert_fast.installed import ATTENTIONS, CACHE, INPUTS, IS_CAUSAL, SERVED_BY_ATTENTION
from bert_fast.kernels.attention_heads_base import additive, causal_mask
from bert_fast.kernels.qkv_linear import qkv_linear
from bert_fast.kernels.runtime import without_autocast
from bert_fast.layer import AttendPlan, attended, projections
from bert_fast.modules import FusedModule, drawn_dropout, fits, ordinary_weight, place_reason
from bert_fast.packing import make_packing
from bert_fast.tiers import (
    ATTENTION_IMPLEMENTATIONS,
    DTYPES,
    attention_shape_reason,
    function_reason,
    is_capture_hook,
    linear_reason,
    module_reason,
)
from bert_fast.training import attentions_dtype, compute_dtype, differentiable_context, dropout_rate

Tensor = torch.Tensor
Attended = tuple[Tensor, Tensor | None]


def projection_parts(module: nn.Module) -> dict[str, nn.Module]:
    """Query, key and value of an attention module, by the names of their family."""
    return {name: getattr(module, name) for name in module._family.names[1:4]}


def projections_reason(module: nn.Module) -> str | None:
    """Why query, key and value are called one by one; None: they are products of one and the same size."""
    parts = projection_parts(module)
    first, query = next(iter(parts.items()))
    weight = ordinary_weight(query)
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
        place_reason(module, _any_weight(module))
        or attention_shape_reason(module, heads, getattr(module, "all_head_size", _size(module)), family.scale(module))
        or function_reason(family)
    )


def _any_weight(module: nn.Module) -> Tensor | None:
    """A floating-point parameter of a module, for its device and dtype."""
    return next((p for p in module.parameters() if p.is_floating_point() and p.dtype in DTYPES), None)


def attention_call_reason(module: Any, given: dict[str, Any]) -> str | None:
    """What about the arguments of a self-attention's call, by role, needs transformers' code."""
    if given.get(IS_CAUSAL):
        return f"{IS_CAUSAL} was given"
    own = module._signature.positional[0], IS_CAUSAL
    unserved = module._signature.unserved(given, SERVED_BY_ATTENTION | {*own})
    if unserved is not None:
        return f"argument {unserved!r} is left to transformers"
    mask, like = given.get(INPUTS.attention_mask), _any_weight(module)
    if mask is None or like is None:
        return None
    if type(mask) not in (Tensor, nn.Parameter) or mask.dim() != 4:
        return f"{INPUTS.attention_mask} is no 4-D tensor"
    if mask.dtype not in (torch.bool, like.dtype):
        return f"{INPUTS.attention_mask} is a 4-D mask of {mask.dtype}, the module is {like.dtype}"
    return None


def self_attention(module: Any, given: dict[str, Any]) -> Attended | None:
    """(context, weights or None) of a self-attention on our ops, None where it is not for them.

    Weights are computed where the call asked for them; upstream's eager has them in any case, for whoever looks.
    """
    hidden, mask = given.get(module._signature.positional[0]), given.get(INPUTS.attention_mask)
    if hidden is None or attention_call_reason(module, given) is not None:
        return None
    like = _any_weight(module)
    assert like is not None
    if not fits(hidden, like, like.dtype) or hidden.dim() != 3:
        return None
    (B, S, _), heads, size = hidden.shape, getattr(module, module._family.heads), _size(module)
    if mask is not None:
        if any(n not in (1, want) for n, want in zip(mask.shape, (B, heads, S, S), strict=True)):
            return None
        if mask.stride(2) == 0:  # one row of keys for all queries
            mask = mask[:, :, :1]
    kind, device = module.config._attn_implementation, hidden.device
    hooked = not all(map(is_capture_hook, list(module._forward_hooks.values())))
    # eager always hands them on
    want_probs = _asked_for_weights(module, given) or kind == "eager" or (kind != "sdpa" and hooked)
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
        dropout = drawn_dropout(dropout_rate(module, module.dropout), device)
        plan = AttendPlan(packing, heads, module._family.scale(module), kind != "sdpa", dropout, dtype)
        context, probs, _ = attended(plan, qkv, packing.bias, want_probs)
        if want_probs:
            probs = probs.to(attentions_dtype(device.type, hidden.dtype, dtype, mask is not None))
            if probs.requires_grad:
                context = differentiable_context(qkv, probs, packing)
    return torch.ops.aten._unsafe_view(context, (B, S, context.shape[1])), probs if want_probs else None


class _EagerView:
    """A module as its own forward sees it, except that the configured attention is eager, and that an output
    projection of its own (DistilBERT's) is left to the caller."""

    config = SimpleNamespace(_attn_implementation="eager")  # all that the forward reads of it
    out_lin = staticmethod(lambda context: context)

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _causal_keep(module: Any, given: dict[str, Any], hidden: Tensor) -> Tensor | None:
    """The keep-mask that sdpa's `is_causal` stands for, where a call without a mask has it."""
    is_causal, cache, q_len = given.get(IS_CAUSAL), given.get(CACHE), hidden.shape[1]
    if q_len == 1 or not (module.is_causal if is_causal is None else is_causal):
        return None
    kv_len = q_len if cache is None else cache.get_mask_sizes(q_len, module.layer_idx)[0]
    return causal_mask(q_len, kv_len, hidden.device)


def _without_dead_rows(attended: Attended, keep: torch.Tensor | None) -> Attended:
    """sdpa's zeros for queries that `keep` leaves no key; context (B, S, heads * D), weights (B, heads, S, keys).

    Weights that carry gradient stay the tensor that the context was computed from, uniform in such a row.
    """
    context, weights = attended
    if keep is None or keep.dtype != torch.bool or weights is None:
        return attended
    dead = ~keep.any(-1, keepdim=True)
    per_head = context.view(*context.shape[:2], weights.shape[1], -1).masked_fill(dead.transpose(1, 2), 0.0)
    if not weights.requires_grad:
        weights = weights.masked_fill(dead, 0.0)
    return per_head.view(context.shape), weights


def _asked_for_weights(module: nn.Module, given: dict[str, Any]) -> bool:
    return bool(given.get(ATTENTIONS, getattr(module.config, ATTENTIONS, False)))


def _wants_weights(module: nn.Module, given: dict[str, Any]) -> bool:
    """Of sdpa, which keeps none."""
    return module.config._attn_implementation == "sdpa" and _asked_for_weights(module, given)


def _kept(mask: Any, hidden: Any) -> Any:
    """A boolean keep-mask as the additive one that eager takes; what is no mask (a tracer's proxy) as it is."""
    return additive(mask, hidden.dtype) if isinstance(mask, Tensor) else mask


def _as_eager(module: Any, upstream: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """transformers' forward, with a boolean mask as eager reads it."""
    signature, name = module._signature, INPUTS.attention_mask
    given = signature.bind(args, kwargs)
    if given is not None and isinstance(given.get(name), Tensor):
        mask = _kept(given[name], given[signature.positional[0]])
        args, kwargs = signature.with_value(name, mask, args, kwargs)
    return upstream(*args, **kwargs)


def _adjusted(
    module: Any, upstream: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any],
    causal_keep: Callable[[Any, dict[str, Any], Tensor], Tensor | None], project: Callable[[Attended], Attended],
) -> Attended:  # fmt: skip
    """transformers' forward, changed where weights are wanted of sdpa, and where eager is given a boolean mask."""
    signature, name = module._signature, INPUTS.attention_mask
    given = signature.bind(args, kwargs)
    if given is None or name not in signature.spelled or module._family.difference() is not None:
        return upstream(*args, **kwargs)
    if not _wants_weights(module, given):
        eager = module.config._attn_implementation == "eager"
        return _as_eager(module, upstream, args, kwargs) if eager else upstream(*args, **kwargs)
    hidden, keep = given[signature.positional[0]], given.get(name)
    if keep is None:
        keep = causal_keep(module, given, hidden)
    args, kwargs = signature.with_value(name, _kept(keep, hidden), args, kwargs)
    return project(_without_dead_rows(module._upstream.forward(_EagerView(module), *args, **kwargs), keep))


class SelfAttention(FusedModule):
    """Self-attention on our ops where it can be; see the module's docstring for what differs elsewhere."""

    _parts_reason = staticmethod(self_attention_reason)

    def _project(self, attended: Attended) -> Attended:
        return attended

    def _fused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Attended | None:
        given = self._signature.bind(args, kwargs)
        attended = None if given is None else self_attention(self, given)
        return None if attended is None else self._project(attended)

    def _unfused(self, upstream: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Attended:
        return _adjusted(self, upstream, args, kwargs, _causal_keep, self._project)


class ProjectedSelfAttention(SelfAttention):
    """DistilBERT's, whose output projection is part of the module."""

    def _project(self, attended: Attended) -> Attended:
        context, weights = attended
        return self.out_lin(context), weights


class OwnAttention:
    """MPNet's self-attention, which calls no attention function: only its masks are seen to."""

    def _run(self, upstream: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        differs = self._family.difference() is not None
        return upstream(*args, **kwargs) if differs else _as_eager(self, upstream, args, kwargs)


class CrossAttention:
    """transformers' cross-attention; see the module's docstring for what differs."""

    def _run(self, upstream: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Attended:
        return _adjusted(self, upstream, args, kwargs, lambda *_: None, lambda attended: attended)
