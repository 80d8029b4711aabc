"""Our classes: each is one of transformers' with a forward of ours before it, and nothing else.

A model is built by transformers' own constructor, then the classes of its modules are swapped in place: parameters,
state_dict keys, random numbers drawn, hooks and isinstance stay as they were. `derive` makes the classes of one family
(families/); what is in here is the same for all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing

from bert_fast import graphs, snapshot
from bert_fast.checks import check_inputs, check_one_of
from bert_fast.direct import run_directly
from bert_fast.family import Family, argument_names, family_of
from bert_fast.outputs import make_outputs
from bert_fast.packing import check_padding, resolve_padding
from bert_fast.tiers import (
    FORWARDS,
    autocast_reason,
    call_reason,
    model_reason,
    module_reason,
    register_family,
    surroundings_reason,
    warn_once,
    word_table,
)

SWAPS: dict[type, type] = {}  # transformers' class -> ours
UPSTREAM: dict[type, type] = {}  # and back

FIRST_TOKEN_ONLY = "_bert_fast_first_token_only"  # a head tells its model that it reads the first token alone
FLAGS = ("output_hidden_states", "output_attentions")
TENSORS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
OTHERS = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values")


class FastModel:
    """What every model and head adds: `padding`, and the class swap after transformers' constructor."""

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


class EncoderModel(FastModel):
    """A base model on fused kernels: same arguments, same outputs, real attentions on request.

    Where a call cannot take the fused path, transformers' own forward runs, with the same result;
    `bert_fast.explain(model, **inputs)` says which and why. Errors of arguments: checks.py.
    """


class FirstTokenHead(FastModel):
    """A head that reads the first token only: tells its model, which may then skip padding (padding="auto")."""


def fast_modules(model: nn.Module) -> Iterator[FastModel]:
    """The models and heads in `model` that have a padding mode."""
    return (module for module in model.modules() if isinstance(module, FastModel))


def split_arguments(
    family: Family, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]] | None:
    """(tensors, others, the rest) of a call's arguments; None where they do not fit the signature."""
    given = dict(zip(family.parameters, args, strict=False))
    if len(args) > len(family.parameters) or given.keys() & kwargs.keys():
        return None
    given.update(kwargs)
    given.pop("use_cache", None)
    tensors = {name: given.pop(name, None) if name in family.parameters else None for name in TENSORS}
    others = {name: given.pop(name, None) for name in OTHERS if name in family.parameters}
    return tensors, others, {k: v for k, v in given.items() if v is not None or k not in family.parameters}


def output_flags(model: nn.Module, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """(output_hidden_states, output_attentions) of a call, from its arguments or the config, as upstream reads them."""
    return tuple(  # type: ignore[return-value]
        kwargs[name] if name in kwargs else getattr(model.config, name, False) for name in FLAGS
    )


def encoder_check(
    model: nn.Module, tensors: dict[str, Any], others: dict[str, Any], kwargs: dict[str, Any]
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
    model: Any,
    plain: snapshot.Snapshot,
    B: int,
    S: int,
    tensors: dict[str, Any],
    hidden_states: bool,
    attentions: bool,
    first_token_only: bool,
) -> graphs.Call:
    """What one checked call computes; tensors in order of TENSORS. first_token_only: a head reads nothing else."""
    mask, returns_positions = tensors["attention_mask"], hidden_states or attentions
    # a 4-D mask may have a bias for every query: its last layer is computed like the others
    every_query = mask is not None and mask.dim() == 4 or plain.view.relative_bias is not None
    skip = not every_query and resolve_padding(model._padding, first_token_only, returns_positions) == "skip"
    first_tokens = first_token_only and not returns_positions and not every_query
    return graphs.Call(B, S, *tensors.values(), skip, hidden_states, attentions, first_tokens)


@torch.compiler.assume_constant_result
def _install_capture_hooks(model: nn.Module) -> None:
    """transformers installs them in the first call that asks for outputs, under a lock that a compiler cannot trace;
    this one it runs while it traces."""
    output_capturing.maybe_install_capturing_hooks(model)


def fused_forward(model: Any, upstream: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of every base model. upstream: transformers' own, bound to the model."""
    first_token_only = kwargs.pop(FIRST_TOKEN_ONLY, False)
    if torch.compiler.is_compiling():  # before anything that a compiler would have to trace
        if any(output_flags(model, kwargs)):
            _install_capture_hooks(model)
        return upstream(*args, **kwargs)
    family = family_of(model)
    split = split_arguments(family, args, kwargs)
    if split is None:
        return upstream(*args, **kwargs)
    tensors, others, rest = split
    reason, plain = encoder_check(model, tensors, others, rest)
    if plain is None:
        warn_once(reason)
        return upstream(*args, **kwargs)
    hidden_states, attentions = output_flags(model, rest)
    return_dict = rest["return_dict"] if "return_dict" in rest else getattr(model.config, "return_dict", True)
    check_one_of(tensors["input_ids"], tensors["inputs_embeds"])
    B, S = check_inputs(plain.view, **tensors)
    call = make_call(model, plain, B, S, tensors, bool(hidden_states), bool(attentions), first_token_only)
    encoded = graphs.replayed(plain, call) or run_directly(call, plain)
    return make_outputs(family, encoded, hidden_states, attentions, return_dict, model.config.num_hidden_layers)


def reads_first_token_only(head: Any) -> bool:
    """Whether nobody sees more than the first token of what the base model of a FirstTokenHead returns."""
    base, family, upstream = head.base_model, head._family, head._upstream
    cls = type(base)
    if cls not in UPSTREAM or base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__:
        return False
    if cls.forward is not FORWARDS[cls] or upstream.forward is not FORWARDS[upstream]:
        return False
    reader = family.sequence_readers.get(upstream)
    return reader is None or module_reason(head.classifier, reader) is None


def _first_token_forward(head: Any, upstream: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if reads_first_token_only(head):
        kwargs[FIRST_TOKEN_ONLY] = True
    return upstream(*args, **kwargs)


def _derived(mixin: type, upstream: type, family: Family, home: str) -> type:
    """The class of ours for one of transformers', importable from the module `home`."""
    namespace = {"__module__": home, "__doc__": upstream.__doc__, "_family": family, "_upstream": upstream}
    namespace["_arguments"] = argument_names(upstream.forward)
    runs = {EncoderModel: fused_forward, FirstTokenHead: _first_token_forward}.get(mixin)
    if runs is not None:

        @functools.wraps(upstream.forward, assigned=("__doc__",), updated=())  # inspect.signature shows upstream's own
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return runs(self, super(cls, self).forward, args, kwargs)

        namespace["forward"] = forward
        if mixin is EncoderModel:
            namespace["__doc__"] = f"{mixin.__doc__}\n    Follows {upstream.__module__}."
    cls = type(upstream.__name__, (mixin, upstream), namespace)
    SWAPS[upstream], UPSTREAM[cls] = cls, upstream
    return cls


def derive(family: Family, home: str) -> dict[str, type]:
    """Our classes of a family by name, for the namespace of the module `home`, from which pickle imports them."""
    hf = family.hf
    mixins = {family.model: EncoderModel, **family.fused}
    mixins |= {getattr(hf, name): FirstTokenHead for name in family.first_token_heads}
    mixins |= {getattr(hf, name): FastModel for name in family.other_heads}
    classes = {upstream.__name__: _derived(mixin, upstream, family, home) for upstream, mixin in mixins.items()}
    family.derived.extend(classes.values())
    register_family(family)
    return classes


def _register_captures(module: nn.Module, cls: type) -> None:
    """transformers looks the outputs to capture up by the name of a class, here of the one that `module` will have."""
    if hasattr(module, "_can_record_outputs"):
        # past its own __setitem__: after 5.17 that one takes a model of the class, and there is none yet
        dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(cls), module._can_record_outputs)


def swap_classes(model: nn.Module, classes: dict[type, type] = SWAPS) -> None:
    """Give every module of an exact class in `classes` the one that stands for it there, in place."""
    for module in model.modules():
        old, new = type(module), classes.get(type(module))
        if new is None:
            continue
        if isinstance(module, PreTrainedModel):
            _register_captures(module, new)  # before another thread can call it
        module.__class__ = new
        for name in ("forward", "_old_forward"):  # accelerate's hooks keep the method they found, and leave it there
            if getattr(module.__dict__.get(name), "__func__", None) is old.forward:
                setattr(module, name, MethodType(new.forward, module))
