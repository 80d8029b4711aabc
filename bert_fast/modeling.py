"""Our classes: each is one of transformers' with a forward of ours before it, and nothing else.

A model is built by transformers' own constructor, then the classes of its modules are swapped in place: parameters,
state_dict keys, random numbers drawn, hooks and isinstance stay as they were. `derive` makes the classes of one family
(families/); what is in here is the same for all of them.
"""

from __future__ import annotations

import copy
import copyreg
import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing

from bert_fast import graphs, snapshot
from bert_fast.checks import check_inputs, check_one_of
from bert_fast.direct import run_directly
from bert_fast.family import FAMILIES, UPSTREAM, Family, family_of
from bert_fast.installed import Inputs, ModelArguments, Signature, collects_outputs, model_arguments
from bert_fast.outputs import make_outputs
from bert_fast.packing import check_padding, resolve_padding
from bert_fast.surroundings import autocast_reason, surroundings_reason
from bert_fast.tiers import (
    FORWARDS,
    call_reason,
    model_reason,
    module_reason,
    register_family,
    warn_once,
    word_table,
)

SWAPS: dict[type, type] = {}  # transformers' class -> ours
SIBLINGS: dict[type, type] = {}  # transformers' class -> ours for an object that accelerate changes

FIRST_TOKEN_ONLY = "_bert_fast_first_token_only"  # a head tells its model that it reads the first token alone
OWN_ATTRIBUTES = ("_padding",)  # what we set on an object, and transformers has not


class FastModel:
    """What every model and head adds: `padding`, and the class swap after transformers' constructor."""

    _padding = "auto"

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

    def _run(self, upstream: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _model_forward(self, upstream, args, kwargs)


class FirstTokenHead(FastModel):
    """A head that reads the first token only: tells its model, which may then skip padding (padding="auto")."""

    def _run(self, upstream: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if reads_first_token_only(self):
            kwargs[FIRST_TOKEN_ONLY] = True
        return upstream(*args, **kwargs)


class Sibling:
    """An object that accelerate changed looks like transformers' own to whoever reads its class.

    The class has upstream's module and qualified name. What is pickled is an object of upstream's class, which loads
    where bert_fast is not; a copy is accelerated like the original.
    """

    def _copied_with(self, copied: Callable[[Any], Any], memo: dict[int, Any]) -> Any:
        new = memo[id(self)] = object.__new__(type(self))
        new.__setstate__(copied(super().__reduce_ex__(2)[2]))
        return new

    def __copy__(self) -> Any:
        return self._copied_with(dict, {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._copied_with(lambda state: copy.deepcopy(state, memo), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) not in UPSTREAM:  # a class that somebody made of ours
            return super().__reduce_ex__(protocol)
        state = {name: value for name, value in super().__reduce_ex__(2)[2].items() if name not in OWN_ATTRIBUTES}
        return copyreg._reconstructor, (UPSTREAM[type(self)], object, None), state


def fast_modules(model: nn.Module) -> Iterator[FastModel]:
    """The models and heads in `model` that have a padding mode."""
    return (module for module in model.modules() if isinstance(module, FastModel))


def encoder_check(model: nn.Module, given: ModelArguments) -> tuple[str | None, snapshot.Snapshot | None]:
    """(None, the model's snapshot) of a call for the encoder tier, (why it is not, None) of another one."""
    reason = surroundings_reason()
    plain = None if reason else snapshot.held(model)
    if plain is not None:
        device, dtype = plain.device, plain.dtype
    else:
        like = word_table(model)
        like = next(model.parameters()) if like is None else like
        device, dtype = like.device, like.dtype
        reason = reason or autocast_reason(device.type, dtype) or model_reason(model)
        plain = None if reason else snapshot.take(model)
    reason = reason or autocast_reason(device.type, dtype) or call_reason(given, dtype)
    return reason, None if reason else plain


def make_call(
    model: Any, plain: snapshot.Snapshot, B: int, S: int, inputs: Inputs, given: ModelArguments, first_token_only: bool
) -> graphs.Call:
    """What one checked call computes. inputs: its tensors, checked; first_token_only: a head reads nothing else."""
    hidden_states, attentions = bool(given.hidden_states), bool(given.attentions)
    mask, returns_positions = inputs.attention_mask, hidden_states or attentions
    # a 4-D mask may have a bias for every query: its last layer is computed like the others
    every_query = mask is not None and mask.dim() == 4 or plain.view.relative_bias is not None
    skip = not every_query and resolve_padding(model._padding, first_token_only, returns_positions) == "skip"
    first_tokens = first_token_only and not returns_positions and not every_query
    return graphs.Call(B, S, *inputs, skip, hidden_states, attentions, first_tokens)


@torch.compiler.assume_constant_result
def _install_capture_hooks(model: nn.Module) -> None:
    """transformers installs them in the first call that asks for outputs, under a lock that a compiler cannot trace;
    this one it runs while it traces."""
    output_capturing.maybe_install_capturing_hooks(model)


def _model_forward(model: Any, upstream: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first_token_only = kwargs.pop(FIRST_TOKEN_ONLY, False)
    if torch.compiler.is_compiling():  # before anything that a compiler would have to trace
        if collects_outputs(model.config, kwargs):
            _install_capture_hooks(model)
        return upstream(*args, **kwargs)
    family = family_of(model)
    given = model_arguments(model._signature, model.config, args, kwargs)
    if given is None:
        return upstream(*args, **kwargs)
    reason, plain = encoder_check(model, given)
    if plain is None:
        warn_once(reason)
        return upstream(*args, **kwargs)
    check_one_of(given.inputs)
    B, S, inputs = check_inputs(plain.view, given.inputs)
    call = make_call(model, plain, B, S, inputs, given, first_token_only)
    encoded = graphs.replayed(plain, call) or run_directly(call, plain)
    return make_outputs(family, encoded, given, model.config)


def reads_first_token_only(head: Any) -> bool:
    """Whether nobody sees more than the first token of what the base model of a FirstTokenHead returns."""
    base, family, upstream = head.base_model, head._family, head._upstream
    cls = type(base)
    if cls not in UPSTREAM or base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__:
        return False
    if family.difference() is not None:  # then transformers' code is not told what it may not know
        return False
    if cls.forward is not FORWARDS[cls] or upstream.forward is not FORWARDS[upstream]:
        return False
    reader = family.sequence_readers.get(upstream)
    return reader is None or module_reason(head.classifier, reader) is None


def _derived(mixin: type, upstream: type, family: Family, home: str) -> type:
    """The class of ours for one of transformers', importable from the module `home`.

    Constructor and forward show upstream's signatures; the latter is `mixin._run`, where it has one.
    """
    namespace = {"__module__": home, "__doc__": upstream.__doc__, "_family": family, "_upstream": upstream}
    namespace |= {"_signature": Signature(upstream.forward), "_swaps": SWAPS}
    if hasattr(mixin, "_run"):

        @functools.wraps(upstream.forward, assigned=("__doc__",), updated=())
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._run(super(cls, self).forward, args, kwargs)

        namespace["forward"] = forward
    if issubclass(mixin, FastModel):

        @functools.wraps(upstream.__init__, assigned=("__doc__",), updated=())
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            super(cls, self).__init__(*args, **kwargs)
            swap_classes(self, self._swaps)

        namespace["__init__"] = __init__
    if mixin is EncoderModel:
        namespace["__doc__"] = f"{mixin.__doc__}\n    Follows {upstream.__module__}."
    cls = type(upstream.__name__, (mixin, upstream), namespace)
    add_swap(upstream, cls)
    return cls


def add_swap(upstream: type, ours: type) -> None:
    """Enter a class of ours into the tables, and one like it for objects that accelerate changes."""
    looks = {name: getattr(upstream, name) for name in ("__module__", "__qualname__", "__doc__")}
    sibling = type(upstream.__name__, (Sibling, ours), looks | {"_swaps": SIBLINGS})
    SWAPS[upstream], SIBLINGS[upstream] = ours, sibling
    UPSTREAM[ours] = UPSTREAM[sibling] = upstream


def derive(family: Family, home: str) -> dict[str, type]:
    """Our classes of a family by name, for the namespace of the module `home`, from which pickle imports them."""
    hf = family.hf
    _ = family.forwards, family.functions  # what this transformers lacks shows before anything is registered
    mixins = {family.model: EncoderModel, **family.fused}
    mixins |= {getattr(hf, name): FirstTokenHead for name in family.first_token_heads}
    mixins |= {getattr(hf, name): FastModel for name in family.other_heads}
    classes = {upstream.__name__: _derived(mixin, upstream, family, home) for upstream, mixin in mixins.items()}
    family.derived.extend((*classes.values(), *map(SIBLINGS.__getitem__, mixins)))
    register_family(family)
    FAMILIES.append(family)
    return classes


def _register_captures(module: nn.Module, cls: type) -> None:
    """transformers looks the outputs to capture up by the name of a class, here of the one that `module` will have."""
    if hasattr(module, "_can_record_outputs"):
        # past its own __setitem__: after 5.17 that one takes a model of the class, and there is none yet
        dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(cls), module._can_record_outputs)


def swap_classes(model: nn.Module, classes: dict[type, type]) -> None:
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
