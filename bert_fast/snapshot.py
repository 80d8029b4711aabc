"""What `tiers.model_reason` found, kept: the walk over all modules costs more than the launches of a small forward.

Of a model there are up to two, one for each value of its training flag: a run that trains and evaluates in turns keeps
both, and the CUDA graphs of its evaluation.

A snapshot is taken after a walk that found every module plain. `holds` then compares, in passes that run in C over
lists prepared once, everything the walk reads that can change between two calls: the tree of modules and their types,
the number of their attributes (an instance's `forward` is one more), training flags, hooks, type and address of every
parameter and of the embeddings' buffers, sizes and constants, the configs, and the functions and class attributes that
a call would run. Where it does not hold, the walk runs again. CUDA graphs (graphs.py) live as long as their snapshot:
an address that has moved ends both.

Blind spots, in which a fresh walk would see what this does not:
- `parameter.data` set to a view of the same memory with another shape or strides, or another dtype (the word table's
  dtype is compared, so that casts of the whole model are seen);
- an attribute deleted and another added on the same module between two calls;
- a hook put into a module's dict of hooks by hand: hooks are looked at after any `register_...hook` in the process;
- the dict itself of `_modules`, `_parameters` or `_buffers` exchanged for another one.
A submodule that refers back to its model keeps the snapshot, and with it the model, alive.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from operator import attrgetter, getitem, itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from bert_fast.family import UPSTREAM, Family, family_of
from bert_fast.installed import IS_CAUSAL
from bert_fast.tiers import is_capture_hook, mask_function

_FORWARD_OF = attrgetter("forward")
_CHECKPOINTING = attrgetter("gradient_checkpointing")  # an attribute of the class until it is set
_TRAINING = itemgetter("training")
_CONFIG_OF = itemgetter("config")
_HOOKS = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONFIG = ("is_decoder", IS_CAUSAL, "_attn_implementation", "_attn_implementation_internal")
# what encode and the walk read of a torch module beside its parameters
_CONSTANTS: dict[type, tuple[str, ...]] = {
    nn.LayerNorm: ("eps",),
    nn.Linear: ("out_features",),  # of the intermediate one alone
    nn.Embedding: ("max_norm", "sparse", "scale_grad_by_freq", "padding_idx"),
}
# and of a module of transformers, where it has that attribute
_NUMBERS = ("scaling", "attention_head_size", "is_decoder", IS_CAUSAL, "add_cross_attention", "padding_idx")
_NUMBERS += ("chunk_size_feed_forward", "act")
_UNREADABLE = (RuntimeError, TypeError, KeyError, AttributeError)  # of what is removed, or has no memory of its own


def _flat(dicts: Any) -> list[Any]:
    """All values of the dicts, in order."""
    return list(chain.from_iterable(map(dict.values, dicts)))


def _globals_of(model: nn.Module, family: Family, classes: Iterable[type]) -> tuple[Any, ...]:
    """Facts outside the modules, compared by `==`; classes: those whose forwards a call runs."""
    return (
        *map(model.config.__dict__.get, _CONFIG),
        mask_function(model),
        family.current_functions(),
        *map(_FORWARD_OF, classes),
    )


class Snapshot:
    """The state of a plain model; no reference to the model itself, so that it can die.

    view: its parts; device, dtype: the model's; training: any module is in training mode; max_length: of the default
    positions; graphs: what graphs.py captured under it.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        below = modules[1:]
        family = self._family = family_of(model)
        view = self.view = family.view(model)
        kinds = set(map(type, modules))
        self._classes = [family.model, *kinds, *(UPSTREAM[kind] for kind in kinds if kind in UPSTREAM)]
        self._globals = _globals_of(model, family, self._classes)
        self._trees = [m._modules for m in modules if m._modules]
        self._children = _flat(self._trees)
        self._types = list(map(type, self._children))
        # of this dropout only p and the parent's training flag are read, and those in training only
        own = [] if family.dropout_is_called else [layer.attention for layer in view.layers]
        times = Counter(map(id, self._children))  # one that stands elsewhere too is called there
        unread = {key for a in own if times[key := id(getattr(a, "dropout", None))] == 1}
        self._dicts = [m.__dict__ for m in below if id(m) not in unread]
        self._lengths = list(map(len, self._dicts))
        self._training = list(map(_TRAINING, self._dicts))
        self.training = model.training or any(self._training)
        self._layers = [layer for layer in family.layers_of(model) if hasattr(layer, "gradient_checkpointing")]
        self._checkpointing = list(map(_CHECKPOINTING, self._layers))
        self._own_configs = [a.__dict__ for a in (layer.attention for layer in view.layers) if "config" in a.__dict__]
        self._configs = self._read_configs()
        self._newest_hook = self._hook_seen = -1
        # transformers' own, which a walk lets pass; another one came after the walk, from another thread
        self._hooks = list(filter(is_capture_hook, self._read_hooks()))
        embeddings = model.embeddings
        tensors = [(embeddings._buffers, name) for name in embeddings._buffers]
        tensors += [(m._parameters, name) for m in below for name in m._parameters]
        self._tensors = [dicts for dicts, _ in tensors], [name for _, name in tensors]
        self._word = embeddings.word_embeddings._parameters
        word = self._word["weight"]
        self.device, self.dtype = word.device, word.dtype
        counted = view.embeddings.positions is not None
        self.max_length = sys.maxsize if counted else embeddings.position_ids.shape[1]
        self.graphs: Any = None
        dicts_of = {_CONSTANTS[cls]: [m.__dict__ for m in below if isinstance(m, cls)] for cls in _CONSTANTS}
        dicts_of[_CONSTANTS[nn.Linear]] = [layer.up.__dict__ for layer in view.layers]
        for m in below:
            if not type(m).__module__.startswith("torch."):
                names = tuple(name for name in (*_NUMBERS, family.heads) if name in m.__dict__)
                dicts_of.setdefault(names, []).append(m.__dict__)
        self._constants: list[tuple[Any, list[dict[str, Any]], list[Any]]] = []
        self._addresses: list[Any] | None = None
        try:
            for names, dicts in dicts_of.items():
                if names:
                    read = itemgetter(*names)
                    self._constants.append((read, dicts, list(map(read, dicts))))
            self._addresses = self._read_addresses()
        except _UNREADABLE:  # walk at every call
            pass

    def _read_addresses(self) -> list[Any]:
        tensors = list(map(getitem, *self._tensors))
        return [*map(type, tensors), *map(torch.Tensor.data_ptr, tensors)]

    def _read_configs(self) -> list[Any]:
        """Which configs the attention modules have, and what each of these says."""
        configs = list(map(_CONFIG_OF, self._own_configs))
        return [*map(id, configs), *(config._attn_implementation for config in {id(c): c for c in configs}.values())]

    def _read_hooks(self) -> list[Any]:
        return _flat(filter(None, chain.from_iterable(map(_HOOKS, self._dicts))))

    def _same_hooks(self) -> bool:
        newest = RemovableHandle.next_id  # counts every hook registered in the process, on whatever
        if newest != self._newest_hook:
            if self._read_hooks() != self._hooks:
                return False
            # looked at twice: another thread may just have drawn the number and not yet stored its hook
            self._newest_hook, self._hook_seen = (newest if newest == self._hook_seen else -1), newest
        return True

    def holds(self, model: nn.Module) -> bool:
        """Whether a walk over `model`, the one this was taken of, would still find everything plain and in place.

        The model's own training flag is its owner's to compare (`held`).
        """
        children = _flat(self._trees)
        if children != self._children or list(map(type, children)) != self._types:
            return False
        dicts = self._dicts
        if list(map(len, dicts)) != self._lengths or list(map(_TRAINING, dicts)) != self._training:
            return False
        if not self._same_hooks() or list(map(_CHECKPOINTING, self._layers)) != self._checkpointing:
            return False
        try:
            if self._read_configs() != self._configs:
                return False
            if self._word["weight"].dtype != self.dtype or self._read_addresses() != self._addresses:
                return False
            for read, dicts, values in self._constants:
                if list(map(read, dicts)) != values:
                    return False
        except _UNREADABLE:
            return False
        return _globals_of(model, self._family, self._classes) == self._globals


_snapshots: WeakKeyDictionary[nn.Module, dict[bool, Snapshot]] = WeakKeyDictionary()


def held(model: nn.Module) -> Snapshot | None:
    """The model's snapshot if it still holds."""
    snapshot = _snapshots.get(model, {}).get(model.training)
    return snapshot if snapshot is not None and snapshot.holds(model) else None


def snapshots() -> list[tuple[nn.Module, Snapshot]]:
    """Every snapshot of a model alive."""
    models = [model for ref in _snapshots.keyrefs() if (model := ref()) is not None]  # items() is not for threads
    return [(model, snapshot) for model in models for snapshot in list(_snapshots.get(model, {}).values())]


def take(model: nn.Module) -> Snapshot:
    """A new snapshot of a model that a walk has just found plain; it replaces the one before."""
    snapshot = _snapshots.setdefault(model, {})[model.training] = Snapshot(model)
    return snapshot
