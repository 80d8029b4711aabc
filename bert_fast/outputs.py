"""transformers' output structure, built from what the encoder tier returns.

Upstream collects hidden_states and attentions by hooks (transformers/utils/output_capturing.py); here the same keys,
in the same order, from lists. The hidden states asked for may be a selection, whose meaning changed between versions:
up to 5.17 a list of layer outputs, later indices of hidden states, negative ones and a single one too.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import ModelOutput
from transformers.utils import output_capturing

from bert_fast.encoder import Encoded
from bert_fast.family import Family
from bert_fast.installed import ModelArguments

SELECTS_HIDDEN_STATES = hasattr(output_capturing, "selected_hidden_states")  # later than 5.17


def select_hidden_states(hidden: list[torch.Tensor], wanted: Any, config: Any) -> tuple[torch.Tensor | None, ...]:
    """The tuple upstream returns where hidden states `wanted` (truthy) are asked for, from all L + 1 of them.

    config: whose number of layers upstream resolves negative indices by.
    """
    if isinstance(wanted, bool) or (isinstance(wanted, int) and not SELECTS_HIDDEN_STATES):
        return tuple(hidden)
    if SELECTS_HIDDEN_STATES:
        n = config.num_hidden_layers + 1
        indices = {i % n for i in ([wanted] if isinstance(wanted, int) else wanted) if -n <= i < n}
        return tuple(h if i in indices else None for i, h in enumerate(hidden))
    if isinstance(wanted, (list, tuple, set)):
        return tuple(h if i in set(wanted) else None for i, h in enumerate(hidden[1:]))
    return tuple(hidden)


def make_outputs(
    family: Family, encoded: Encoded, given: ModelArguments, config: Any
) -> ModelOutput | tuple[Any, ...]:  # fmt: skip
    """What a call with these arguments returns; return_dict False gives the tuple."""
    hidden_states, return_dict = given.hidden_states, given.return_dict
    fields = {"last_hidden_state": encoded.last}
    if family.pooler_class is not None:
        fields["pooler_output"] = encoded.pooled
    outputs = family.outputs(**fields)
    if family.own_outputs:
        hidden_states, return_dict = bool(hidden_states), bool(return_dict)
    if hidden_states:
        outputs["hidden_states"] = select_hidden_states(encoded.hidden, hidden_states, config)
    if given.attentions:
        outputs["attentions"] = tuple(encoded.attentions)
        if family.returns_cross_attentions:  # as upstream: asked for, and an encoder has none
            outputs["cross_attentions"] = ()
    if return_dict is not False:
        return outputs
    values = outputs.to_tuple()
    if family.own_outputs and encoded.pooled is None:
        return (values[0], None, *values[1:])
    return values
