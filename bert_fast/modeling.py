"""BertModel and its eight heads: subclasses of transformers' classes of the same names, run by the encoder tier.

A model is built by transformers' own constructor, then the classes of its modules are swapped for subclasses that add
a forward and nothing else: parameters, state_dict keys, random numbers drawn, hooks and isinstance stay as they were.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from transformers.models.bert import modeling_bert as hf
from transformers.utils import output_capturing

from bert_fast import graphs, snapshot
from bert_fast.checks import check_inputs, check_one_of
from bert_fast.direct import run_directly
from bert_fast.modules import (
    BertEmbeddings,
    BertIntermediate,
    BertOutput,
    BertPooler,
    BertPredictionHeadTransform,
    BertSelfOutput,
)
from bert_fast.outputs import SELECTS_HIDDEN_STATES, make_outputs
from bert_fast.packing import check_padding, resolve_padding
from bert_fast.tiers import (
    autocast_reason,
    call_reason,
    model_reason,
    surroundings_reason,
    warn_once,
    word_table,
)
from bert_fast.upstream import BertCrossAttention, BertSelfAttention

FIRST_TOKEN_ONLY = "_bert_fast_first_token_only"  # a head tells its BertModel that it reads the pooler alone


class _Fast:
    """What every class here adds: `padding`, and the class swap after transformers' constructor."""

    _padding = "auto"

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        swap_classes(self)

    @property
    def padding(self) -> str:
        """ "auto", "exact" or "skip"; see `set_padding`."""
        return self._padding

    def set_padding(self, padding: str) -> Any:
        """Choose what becomes of padding positions; returns the model.

        "exact": computed, as transformers does. "skip": not computed; they hold zeros in last_hidden_state,
        hidden_states and attentions (per-token logits there are the head of a zero vector), only position 0 of each
        sequence always is. "auto" (default): "skip" where nobody can see the difference (heads
        that read the first token, no hidden states or attentions asked for), "exact" elsewhere.

        Raises ValueError for any other value.
        """
        check_padding(padding)
        for module in fast_modules(self):
            module._padding = padding
        return self

    @classmethod
    def from_pretrained(cls, *args: Any, padding: str = "auto", **kwargs: Any) -> Any:
        """transformers' from_pretrained, and `padding` (see `set_padding`)."""
        check_padding(padding)
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).set_padding(padding)
        return loaded


class BertModel(_Fast, hf.BertModel):
    """transformers' BertModel on fused kernels: same arguments, same outputs, real attentions on request.

    Follows transformers/models/bert/modeling_bert.py. Where a call cannot take the fused path, transformers' own
    forward runs, with the same result; `bert_fast.explain(model, **inputs)` says which and why.
    """

    @functools.wraps(hf.BertModel.forward, assigned=(), updated=())  # inspect.signature shows upstream's own
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """input_ids (B, S) int or inputs_embeds (B, S, hidden); attention_mask (B, S) or 4-D; errors: `checks.py`.

        Returns transformers' BaseModelOutputWithPoolingAndCrossAttentions: last_hidden_state (B, S, hidden),
        pooler_output (B, hidden), on request hidden_states (L + 1 of (B, S, hidden)) and attentions
        (L of (B, heads, S, S), after softmax).
        """
        first_token_only = kwargs.pop(FIRST_TOKEN_ONLY, False)
        tensors = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        others = {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "past_key_values": past_key_values,
        }
        if torch.compiler.is_compiling():  # before anything that a compiler would have to trace
            return super().forward(**tensors, **others, use_cache=use_cache, **kwargs)
        reason, plain = encoder_check(self, tensors, others, kwargs)
        if plain is None:
            warn_once(reason)
            return super().forward(**tensors, **others, use_cache=use_cache, **kwargs)
        hidden_states, attentions = output_flags(self, kwargs)
        return_dict = kwargs["return_dict"] if "return_dict" in kwargs else getattr(self.config, "return_dict", True)
        check_one_of(input_ids, inputs_embeds)
        B, S = check_inputs(self, **tensors)
        call = make_call(self, B, S, tensors, bool(hidden_states), bool(attentions), first_token_only)
        encoded = graphs.replayed(self, plain, call) or run_directly(self, call, plain)
        return make_outputs(encoded, hidden_states, attentions, return_dict, self.config.num_hidden_layers)


_FORWARD = BertModel.forward


def output_flags(model: hf.BertModel, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """(output_hidden_states, output_attentions) of a call, from its arguments or the config, as upstream reads them."""
    return tuple(  # type: ignore[return-value]
        kwargs[name] if name in kwargs else getattr(model.config, name, False) for name in FLAGS
    )


FLAGS = ("output_hidden_states", "output_attentions")


def encoder_check(
    model: BertModel, tensors: dict[str, Any], others: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[str | None, snapshot.Snapshot | None]:
    """(None, the model's snapshot) of a call for the encoder tier, (why it is not, None) of another one."""
    like = word_table(model)
    like = next(model.parameters()) if like is None else like
    reason = surroundings_reason() or autocast_reason(like.device.type, like.dtype)
    plain = None if reason else snapshot.held(model)
    if reason is None and plain is None:
        reason = model_reason(model)
        plain = None if reason else snapshot.take(model)
    reason = reason or call_reason(tensors, others, kwargs, like.dtype)
    return reason, None if reason else plain


def make_call(
    model: BertModel,
    B: int,
    S: int,
    tensors: dict[str, Any],
    hidden_states: bool,
    attentions: bool,
    first_token_only: bool,
) -> graphs.Call:
    """What one checked call computes; tensors in forward's order. first_token_only: a head reads only the pooler."""
    mask, returns_positions = tensors["attention_mask"], hidden_states or attentions
    skip = resolve_padding(model._padding, first_token_only, returns_positions) == "skip"
    # a 4-D mask may have a bias for every query: its last layer is computed like the others
    first_tokens = first_token_only and not returns_positions and (mask is None or mask.dim() == 2)
    return graphs.Call(B, S, *tensors.values(), skip, hidden_states, attentions, first_tokens)


class _FirstTokenHead(_Fast):
    """A head that reads only pooler_output: tells its BertModel, which may then skip padding (padding="auto")."""

    def _call(self, upstream_forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bert = self.bert
        unseen = type(bert) is BertModel and not bert._forward_hooks and not bert._forward_pre_hooks
        if unseen and BertModel.forward is _FORWARD and "forward" not in bert.__dict__:
            kwargs[FIRST_TOKEN_ONLY] = True
        return upstream_forward(*args, **kwargs)


class BertForPreTraining(_Fast, hf.BertForPreTraining):
    __doc__ = hf.BertForPreTraining.__doc__


class BertLMHeadModel(_Fast, hf.BertLMHeadModel):
    __doc__ = hf.BertLMHeadModel.__doc__


class BertForMaskedLM(_Fast, hf.BertForMaskedLM):
    __doc__ = hf.BertForMaskedLM.__doc__


class BertForNextSentencePrediction(_FirstTokenHead, hf.BertForNextSentencePrediction):
    __doc__ = hf.BertForNextSentencePrediction.__doc__

    @functools.wraps(hf.BertForNextSentencePrediction.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(super().forward, args, kwargs)


class BertForSequenceClassification(_FirstTokenHead, hf.BertForSequenceClassification):
    __doc__ = hf.BertForSequenceClassification.__doc__

    @functools.wraps(hf.BertForSequenceClassification.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(super().forward, args, kwargs)


class BertForMultipleChoice(_FirstTokenHead, hf.BertForMultipleChoice):
    __doc__ = hf.BertForMultipleChoice.__doc__

    @functools.wraps(hf.BertForMultipleChoice.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(super().forward, args, kwargs)


class BertForTokenClassification(_Fast, hf.BertForTokenClassification):
    __doc__ = hf.BertForTokenClassification.__doc__


class BertForQuestionAnswering(_Fast, hf.BertForQuestionAnswering):
    __doc__ = hf.BertForQuestionAnswering.__doc__


SWAPS: dict[type, type] = {
    getattr(hf, cls.__name__): cls
    for cls in (
        *(BertModel, BertEmbeddings, BertSelfAttention, BertCrossAttention, BertSelfOutput),
        *(BertIntermediate, BertOutput, BertPooler, BertPredictionHeadTransform),
        *(BertForPreTraining, BertLMHeadModel, BertForMaskedLM, BertForNextSentencePrediction),
        *(BertForSequenceClassification, BertForMultipleChoice, BertForTokenClassification, BertForQuestionAnswering),
    )
}
UPSTREAM: dict[type, type] = {ours: upstream for upstream, ours in SWAPS.items()}


def fast_modules(model: torch.nn.Module) -> Iterator[_Fast]:
    """The models and heads in `model` that have a padding mode."""
    return (module for module in model.modules() if isinstance(module, _Fast))


def swap_classes(model: torch.nn.Module) -> None:
    """Give every module of an exact transformers class in SWAPS our subclass of it, in place."""
    for module in model.modules():
        ours = SWAPS.get(type(module))
        if ours is not None:
            module.__class__ = ours
            if issubclass(ours, hf.PreTrainedModel):  # transformers looks the outputs to capture up by class
                key = module if SELECTS_HIDDEN_STATES else str(ours)
                output_capturing._CAN_RECORD_REGISTRY[key] = module._can_record_outputs
