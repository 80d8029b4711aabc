"""transformers' own attention modules: on our ops where they can be, else changed where tiers would disagree.

- Weights asked for per call are real under sdpa too: transformers answers with an empty tuple, because
  scaled_dot_product_attention keeps no weights. That call runs transformers' forward with its own eager function; a
  query without any key keeps sdpa's context of zeros, and has weights of zero.
- A 4-D boolean mask says which keys to keep under eager too, where transformers would add it as 0 and 1.

The shared config is not touched, so threads cannot disturb each other. As in modules.py, the classes here are put
before one of transformers'.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from bert_fast.kernels.attention_heads_base import additive, causal_mask
from bert_fast.modules import self_attention, self_attention_reason

Attended = tuple[torch.Tensor, torch.Tensor | None]


class _EagerView:
    """A module as its own forward sees it, except that the configured attention is eager, and that an output
    projection of its own (DistilBERT's) is left to the caller."""

    config = SimpleNamespace(_attn_implementation="eager")  # all that the forward reads of it
    out_lin = staticmethod(lambda context: context)

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _causal_keep(past: Any, layer_idx: int, hidden: torch.Tensor) -> torch.Tensor | None:
    """The keep-mask that sdpa's `is_causal` stands for."""
    q_len = hidden.shape[1]
    if q_len == 1:
        return None
    kv_len = q_len if past is None else past.get_mask_sizes(q_len, layer_idx)[0]
    return causal_mask(q_len, kv_len, hidden.device)


def _additive(mask: torch.Tensor | None, hidden: torch.Tensor) -> torch.Tensor | None:
    """A boolean keep-mask as the additive one that eager takes."""
    return None if mask is None else additive(mask, hidden.dtype)


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


def _asked_for_weights(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("output_attentions", getattr(module.config, "output_attentions", False)))


def _wants_weights(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    """Of sdpa, which keeps none."""
    return module.config._attn_implementation == "sdpa" and _asked_for_weights(module, kwargs)


class SelfAttention:
    """Self-attention on our ops where it can be; see the module's docstring for what differs elsewhere."""

    fused_reason = staticmethod(self_attention_reason)

    def _project(self, attended: Attended) -> Attended:
        return attended

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Attended:
        past = args[0] if args else kwargs.get("past_key_values")
        if not torch.compiler.is_compiling() and len(args) < 2:
            want = _asked_for_weights(self, kwargs)
            fused = self_attention(self, hidden_states, attention_mask, past, want, kwargs)
            if fused is not None:
                return self._project(fused)
        if not _wants_weights(self, kwargs):
            if self.config._attn_implementation == "eager":
                attention_mask = _additive(attention_mask, hidden_states)
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        keep, is_causal = attention_mask, kwargs.get("is_causal")
        if keep is None and (self.is_causal if is_causal is None else is_causal):
            keep = _causal_keep(past, self.layer_idx, hidden_states)
        mask = _additive(keep, hidden_states)
        attended = self._upstream.forward(_EagerView(self), hidden_states, mask, *args, **kwargs)
        return self._project(_without_dead_rows(attended, keep))


class ProjectedSelfAttention(SelfAttention):
    """DistilBERT's, whose output projection is part of the module."""

    def _project(self, attended: Attended) -> Attended:
        context, weights = attended
        return self.out_lin(context), weights


class OwnAttention:
    """MPNet's self-attention, which calls no attention function: only its masks are seen to."""

    def forward(self, hidden_states: torch.Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        return super().forward(hidden_states, _additive(attention_mask, hidden_states), *args, **kwargs)


class CrossAttention:
    """transformers' cross-attention; see the module's docstring for what differs."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Attended:
        if not _wants_weights(self, kwargs):
            if self.config._attn_implementation == "eager":
                attention_mask = _additive(attention_mask, hidden_states)
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, past_key_values, **kwargs)
        mask = _additive(attention_mask, hidden_states)
        attended = self._upstream.forward(
            _EagerView(self), hidden_states, encoder_hidden_states, mask, past_key_values, **kwargs
        )
        return _without_dead_rows(attended, attention_mask)
