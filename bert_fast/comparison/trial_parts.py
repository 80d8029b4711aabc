"""Comparisons beside those of a base model's calls: dropout, heads, decoders, activations, and all of them in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from bert_fast.comparison.declared import undeclared
from bert_fast.comparison.trial import Inputs, Trial, by_modules, set_rate
from bert_fast.comparison.twins import build, tiny_config
from bert_fast.comparison.wording import output_difference
from bert_fast.family import Family
from bert_fast.installed import ATTENTIONS, CROSS_STATES, HIDDEN_STATES, INPUTS
from bert_fast.kernels.linear_gelu import linear_gelu
from bert_fast.modeling import SIBLINGS, swap_classes
from bert_fast.modules import Transform
from bert_fast.tiers import ACTIVATIONS
from bert_fast.upstream import CrossAttention


def differences(family: Family) -> Iterator[str]:
    """Where the installed transformers is not what our code of a family takes it for, each found when it is asked for.

    Raises NotNow where models cannot be built here, and whatever a call raises.
    """
    trial = Trial(family)
    yield from undeclared(family, trial.upstream)
    yield from _of_activations()
    yield from _unknown_dropouts(trial)
    for kind in trial.kinds:
        yield from trial.of_calls(kind)
    yield from trial.of_gradients()
    yield from trial.of_embeddings()
    yield from _of_dropout(trial)
    yield from _of_heads(trial)
    if CrossAttention in family.fused.values():
        yield from _of_decoder(family)


def _of_activations() -> Iterator[str]:
    x = (torch.arange(64, device="cpu", dtype=torch.float32) / 8 - 4).view(8, 8)
    one, zero = torch.eye(8, device="cpu", dtype=torch.float32), x.new_zeros(8)
    for cls, act in ACTIVATIONS.items():
        with torch.no_grad():
            found = output_difference(linear_gelu(x, one, zero, None, act), cls()(x))
        if found is not None:
            yield f"activation {cls.__name__}: {found}"


def _unknown_dropouts(trial: Trial) -> Iterator[str]:
    known = {*trial.dropouts_of_weights(), *trial.other_dropouts()}
    for path, module in trial.upstream.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module not in known:
            yield f"{type(trial.upstream).__name__} has another dropout: {path}"


def _of_dropout(trial: Trial) -> Iterator[str]:
    """Where dropout is, told without drawing: at a rate of 1 it makes what zeros make that stand before it."""
    model, views = trial.upstream, trial.views
    zeros = [model.embeddings.LayerNorm, *(view.down for view in views)]
    zeros += [view.attention_dense for view in views if view.attention_dropout is not None]
    model.config._attn_implementation = "eager"
    for what, dropouts, before in (
        ("attention weights", trial.dropouts_of_weights(), [view.value for view in views]),
        ("hidden states", trial.other_dropouts(), zeros),
    ):
        set_rate(dropouts, 1.0)
        dropped = _states(model.train(), trial.inputs)
        set_rate(dropouts, 0.0)
        with torch.no_grad():
            found = output_difference(dropped, _with_zeros(model.eval(), before, trial.inputs))
        if found is not None:
            yield f"{type(model).__name__} drops out {what} elsewhere: {found}"


@torch.no_grad()
def _states(model: Any, x: Inputs) -> Any:
    return model(**{INPUTS.input_ids: x.ids, INPUTS.attention_mask: x.holes})[0]


@torch.no_grad()
def _with_zeros(model: Any, modules: list[nn.Module], x: Inputs) -> Any:
    """What `_states` are while all parameters of some modules are zero."""
    parameters = [p for module in modules for p in module.parameters()]
    kept = [p.clone() for p in parameters]
    torch._foreach_zero_(parameters)
    states = _states(model, x)
    torch._foreach_copy_(parameters, kept)
    return states


def _of_heads(trial: Trial) -> Iterator[str]:
    """Heads of which we say that they read the first token only, and those with a module of ours, on the same model."""
    family, kind = trial.family, trial.kinds[-1]
    heads = list(family.first_token_heads)
    if Transform in family.fused.values():
        heads += [name for name in family.other_heads if name.endswith("ForMaskedLM")]
    trial.upstream.config._attn_implementation = trial.ours.config._attn_implementation = kind
    config = tiny_config(family, num_hidden_layers=0)
    for name in heads:
        head = build(getattr(family.hf, name), config)
        given = {INPUTS.input_ids: trial.inputs.ids, INPUTS.attention_mask: trial.inputs.holes}
        if name.endswith("ForMultipleChoice"):
            given = {key: value[:, None] for key, value in given.items()}
        with torch.no_grad():
            setattr(head, head.base_model_prefix, trial.upstream)
            expected = head(**given)
            setattr(head, head.base_model_prefix, trial.ours)
            swap_classes(head, SIBLINGS)
            found = output_difference(head(**given), expected)
        if found is not None:
            yield f"{name}({', '.join(given)}): {found}"


def _of_decoder(family: Family) -> Iterator[str]:
    """It runs transformers' code, but for weights asked of sdpa."""
    options = dict.fromkeys(("is_decoder", "add_cross_attention"), True)
    model = build(family.model, tiny_config(family, num_hidden_layers=1, attn_implementation="eager", **options))
    model.config.use_cache = False
    x = Inputs(model.embeddings.word_embeddings.weight.shape[1], model.config.pad_token_id)
    given = {INPUTS.input_ids: x.ids, CROSS_STATES: x.states, HIDDEN_STATES: True, ATTENTIONS: True}
    with torch.no_grad():
        expected = model(**given)
        swap_classes(model, SIBLINGS)
        model.config._attn_implementation = "sdpa"
        found = output_difference(by_modules(model, given), expected)
    if found is not None:
        yield f"{family.model.__name__}({', '.join(given)}) as a decoder under sdpa: {found}"
