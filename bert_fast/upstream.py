"""transformers' own attention modules, changed in one respect: weights asked for per call are real under sdpa too.

transformers answers such a call with an empty tuple, because scaled_dot_product_attention keeps no weights. Here that
call runs transformers' own forward with its own eager function. The shared config is not touched, so threads cannot
disturb each other.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers.models.bert import modeling_bert as hf


class _EagerView:
    """A module as its own forward sees it, except that the configured attention is eager."""

    config = SimpleNamespace(_attn_implementation="eager")  # all that the forward reads of it

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _eager_mask(
    mask: torch.Tensor | None, causal: bool, past: Any, layer_idx: int, hidden: torch.Tensor
) -> torch.Tensor | None:
    """The additive mask eager would have got, from the boolean keep-mask, or none, that sdpa gets."""
    q_len = hidden.shape[1]
    if mask is None and causal and q_len > 1:  # sdpa is told `is_causal` instead
        kv_len = q_len if past is None else past.get_mask_sizes(q_len, layer_idx)[0]
        mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=hidden.device).tril()[None, None]
    if mask is None or mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
    return torch.where(mask, zero, torch.finfo(hidden.dtype).min)


def _wants_weights(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("output_attentions")) and module.config._attn_implementation == "sdpa"


class BertSelfAttention(hf.BertSelfAttention):
    """transformers' BertSelfAttention; real weights under sdpa when `output_attentions` is asked for."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not _wants_weights(self, kwargs):
            return super().forward(hidden_states, attention_mask, past_key_values=past_key_values, **kwargs)
        is_causal = kwargs.get("is_causal")
        causal = self.is_causal if is_causal is None else is_causal
        mask = _eager_mask(attention_mask, causal, past_key_values, self.layer_idx, hidden_states)
        return hf.BertSelfAttention.forward(
            _EagerView(self), hidden_states, mask, past_key_values=past_key_values, **kwargs
        )


class BertCrossAttention(hf.BertCrossAttention):
    """transformers' BertCrossAttention; real weights under sdpa when `output_attentions` is asked for."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not _wants_weights(self, kwargs):
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, past_key_values, **kwargs)
        mask = _eager_mask(attention_mask, False, None, self.layer_idx, hidden_states)
        return hf.BertCrossAttention.forward(
            _EagerView(self), hidden_states, encoder_hidden_states, mask, past_key_values, **kwargs
        )
