"""Forms of our forward that `bench model` times beside the one taken by default: how each is selected, and whether a
call really takes it. A number stands only for what ran."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from bert_fast.explain import explanation
from bert_fast.folded import folded_reason, folding
from bert_fast.one_launch import is_forced, one_launch, one_launch_reason
from bert_fast.packing import make_packing
from bert_fast.snapshot import Snapshot, held

from .records import FOLDED, ONE_LAUNCH


class Variant(NamedTuple):
    select: Callable[[], AbstractContextManager[None]]
    reason: Callable[[torch.nn.Module, dict[str, Any]], str | None]  # why a call that has just been made was not in it


def last_call(model: torch.nn.Module, arguments: dict[str, Any]) -> tuple[Snapshot, bool, int, int]:
    """Of the call just made: the snapshot, whether a CUDA graph was replayed, batch and length of what was computed."""
    snapshot = held(model.base_model)
    assert snapshot is not None, "the model has not been called"
    if explanation(model, **arguments).graph.startswith("replayed"):
        key = next(reversed(snapshot.graphs.entries))  # the last one used
        return snapshot, True, key.B, key.S
    return snapshot, False, *arguments["input_ids"].shape


def _not_folded(model: torch.nn.Module, arguments: dict[str, Any]) -> str | None:
    snapshot, replayed, B, S = last_call(model, arguments)
    if replayed:
        return "a CUDA graph is replayed, which is not folded"
    packing = make_packing(None, B, S, snapshot.device, False, False)  # its size is what is asked for
    return folded_reason(snapshot.view, packing, snapshot.dtype, snapshot.device)


def _not_in_one_launch(model: torch.nn.Module, arguments: dict[str, Any]) -> str | None:
    snapshot, replayed, B, S = last_call(model, arguments)
    if replayed:
        return next(reversed(snapshot.graphs.entries.values())).op_by_op
    if snapshot.graphs is not None and any(key.one_launch for key in snapshot.graphs.failures):
        return "a capture of it failed, and the next one is op by op"
    if not is_forced():
        return "calls without a graph launch op by op"
    return one_launch_reason(snapshot.view, B, S, snapshot.dtype, snapshot.device)


@contextlib.contextmanager
def _folded() -> Iterator[None]:
    with one_launch(False), folding(0):  # one launch would come first
        yield


VARIANTS = {
    FOLDED: Variant(_folded, _not_folded),
    ONE_LAUNCH: Variant(lambda: one_launch(True), _not_in_one_launch),
}


def why_not(name: str, model: torch.nn.Module, arguments: dict[str, Any]) -> str | None:
    """Why there is nothing to time under this name; None: called within its context, the model takes that form.

    Called twice before each answer, so that it is about a CUDA graph's replay where one will be timed.
    """
    select, reason = VARIANTS[name]

    def after_two_calls() -> str | None:
        for _ in range(2):
            model(**arguments)
        return reason(model, arguments)

    if after_two_calls() is None:
        return "the default takes this form itself"
    with select():
        return after_two_calls()


def in_variant(name: str, model: torch.nn.Module, arguments: dict[str, Any]) -> Callable[[], object]:
    def call() -> object:
        with VARIANTS[name].select():
            return model(**arguments)

    return call
