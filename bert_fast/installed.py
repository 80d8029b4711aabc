"""The installed transformers, as far as it moves: what its forwards call their arguments, which releases were tested.

No other file spells an argument of transformers. A forward's `Signature` is read from the class as it is installed, and
an argument is known by its role, whatever this release calls it (5.24 renamed `past_key_values` to `cache`, and takes
the old name too). What a call gives beyond the roles that the callee serves is for transformers' own code, unless it is
the default: `Signature.unserved` names it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import transformers

# releases of transformers on which the tests have run; any other one is compared first (comparison.py)
TESTED_RELEASES = ("5.17.0", "5.23.0", "5.24.0")


def is_tested() -> bool:
    return transformers.__version__ in TESTED_RELEASES


class Inputs(NamedTuple):
    """The tensors of a call of a base model or of its embeddings, or their names."""

    input_ids: Any
    attention_mask: Any
    token_type_ids: Any
    position_ids: Any
    inputs_embeds: Any

    @property
    def given(self) -> Any:
        """The one whose shape is the batch's."""
        return self.inputs_embeds if self.input_ids is None else self.input_ids


INPUTS = Inputs(*Inputs._fields)
CACHE, CACHE_LENGTH = "cache", "cache_length"
HIDDEN_STATES, ATTENTIONS, RETURN_DICT = FLAGS = "output_hidden_states", "output_attentions", "return_dict"
CROSS_STATES, IS_CAUSAL = "encoder_hidden_states", "is_causal"
# other names of a role, in some release
_ROLES = {"past_key_values": CACHE, "past_key_values_length": CACHE_LENGTH}

# what an encoder's result does not depend on: a cache is a decoder's, the number is for the loss
WITHOUT_EFFECT = ("use_cache", "num_items_in_batch")
_SERVED_BY_MODELS = frozenset((*FLAGS, *WITHOUT_EFFECT))
# arguments that, where a call does not give them, are taken to be None, False or 0
_EMPTY_BY_DEFAULT = (*INPUTS, *FLAGS, CACHE_LENGTH, IS_CAUSAL)
SERVED_BY_ATTENTION = _SERVED_BY_MODELS | {INPUTS.attention_mask, INPUTS.position_ids}

# arguments of attention functions by which a model makes more of its scores than a plain softmax; None is harmless
CHANGES_SCORES = ("s_aux", "indices", "block_indices", CACHE)
CHANGES_SCORES_PARTS = ("softcap", "sink", "bias", "alibi")


class Signature:
    """The arguments of one forward.

    positional: their roles, in order, without self; spelled: role -> its name in this release.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.positional = tuple(_role(p.name) for p in named if p.kind is p.POSITIONAL_OR_KEYWORD)
        self.spelled = {_role(p.name): p.name for p in named}
        self._defaults = {_role(p.name): p.default for p in named}
        self.inputs = frozenset(INPUTS) & self.spelled.keys()  # those that this forward has
        self._served_by_model = _SERVED_BY_MODELS | self.inputs

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Role -> value of all that a call gives; None where one is given twice, or too many."""
        if len(args) > len(self.positional):
            return None
        given = dict(zip(self.positional, args, strict=False))
        if _ROLES.keys() & kwargs.keys():
            renamed = {_role(name): value for name, value in kwargs.items()}
            if len(renamed) < len(kwargs):
                return None
            kwargs = renamed
        if args and given.keys() & kwargs.keys():
            return None
        given.update(kwargs)
        return given

    def first(self, n: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """The first n arguments of a call that gives these and nothing else that matters, whatever they are called."""
        given = self.bind(args, kwargs)
        roles = self.positional[:n]
        if given is None or not given.keys() >= {*roles} or self.unserved(given, roles) is not None:
            return None
        return [given[role] for role in roles]

    def unserved(self, given: dict[str, Any], served: Collection[str]) -> str | None:
        """The name of an argument given that is not among the roles served, nor at its default (unknown ones: None)."""
        for role, value in given.items():
            if role not in served and not self._is_default(role, value):
                return self.spelled.get(role, role)
        return None

    def unserved_by_model(self, given: dict[str, Any]) -> str | None:
        served = self._served_by_model
        return None if given.keys() <= served else self.unserved(given, served)

    def unexpected_default(self) -> str | None:
        """The name of an argument of ours whose default means something."""
        for role in _EMPTY_BY_DEFAULT:
            default = self._defaults.get(role)
            if default is not inspect.Parameter.empty and default:
                return self.spelled[role]
        return None

    def with_value(
        self, role: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call's arguments with another value of one that may be given by position or by name."""
        at = self.positional.index(role)
        if at < len(args):
            return (*args[:at], value, *args[at + 1 :]), kwargs
        return args, kwargs | {self.spelled[role]: value}

    def _is_default(self, role: str, value: Any) -> bool:
        default = self._defaults.get(role)
        return value is default or (type(value) is type(default) and isinstance(value, int) and value == default)


def _role(name: str) -> str:
    return _ROLES.get(name, name)


class ModelArguments(NamedTuple):
    """What one call of a base model gives. hidden_states, attentions, return_dict: as given, else as the config says.

    unserved: the name of an argument that only transformers' code heeds, or None.
    """

    inputs: Inputs
    hidden_states: Any
    attentions: Any
    return_dict: Any
    unserved: str | None


def model_arguments(
    signature: Signature, config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> ModelArguments | None:
    """Of one call of a base model; None where it does not fit the signature."""
    given = signature.bind(args, kwargs)
    if given is None:
        return None
    # None for a flag that a model has in its signature is the default, and there the config's word
    flags = [
        given[name]
        if name in given and not (given[name] is None and name in signature.spelled)
        else getattr(config, name, name == RETURN_DICT)
        for name in FLAGS
    ]
    return ModelArguments(Inputs(*map(given.get, INPUTS)), *flags, signature.unserved_by_model(given))


def reaching_base(head: Signature | None, base: Signature, given: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments of a call, by name, those that reach the base model: what a head does not keep to itself.

    head: None where it is not one of transformers', and then only what a base model knows is taken to reach it.
    """
    if head is None:
        known = base.spelled.keys() | _SERVED_BY_MODELS
        return {name: value for name, value in given.items() if _role(name) in known}
    kept = head.spelled.keys() - base.spelled.keys()
    return {name: value for name, value in given.items() if _role(name) not in kept}


def below_model(base: Signature, given: dict[str, Any]) -> dict[str, Any]:
    """Of a base model's arguments, by role, those that its attention modules are called with, and its cache."""
    mask = given.get(INPUTS.attention_mask)
    made = {} if mask is None or mask.dim() != 4 else {INPUTS.attention_mask: mask}  # others become one of our forms
    return {role: value for role, value in given.items() if role not in base.spelled or role == CACHE} | made


def of_embeddings(given: dict[str, Any]) -> dict[str, Any]:
    """Of a base model's arguments, by role, those that its embeddings are called with."""
    inputs = {role: given[role] for role in INPUTS if role in given and role != INPUTS.attention_mask}
    cache = given.get(CACHE)
    return inputs if cache is None else inputs | {CACHE_LENGTH: cache.get_seq_length()}


def collects_outputs(config: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call asks for hidden states or attentions."""
    return any(kwargs.get(name, getattr(config, name, False)) for name in (HIDDEN_STATES, ATTENTIONS))
