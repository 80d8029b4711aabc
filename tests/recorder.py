"""What really runs: a recorder inside the ops' bodies, which the path that a call takes cannot notice.

conftest puts it in before bert_fast is imported. A TorchDispatchMode would see the ops too, but under one transformers'
code runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_runs: list[Recorded] = []  # the recording under way, if any


class Recorded:
    """ops: names in order; modules: those that ran an op of ours directly, not through a submodule."""

    def __init__(self) -> None:
        self.ops: list[str] = []
        self.modules: list[nn.Module] = []
        self._called: list[nn.Module] = []

    def add(self, op: str) -> None:
        self.ops.append(op)
        if self._called:
            self.modules.append(self._called[-1])


def install() -> None:
    """From now on every body that bert_fast registers tells the recording under way."""
    register = torch.library.Library.impl

    @functools.wraps(register)
    def impl(self: Any, op_name: Any, fn: Any, dispatch_key: str = "", **kwargs: Any) -> Any:
        if self.ns == "bert_fast" and dispatch_key in ("CPU", "CUDA"):  # not autograd's, which calls these
            fn = _telling(str(op_name), fn)
        return register(self, op_name, fn, dispatch_key, **kwargs)

    torch.library.Library.impl = impl


def _telling(op: str, body: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(body)
    def told(*args: Any, **kwargs: Any) -> Any:
        for run in _runs:
            run.add(op)
        return body(*args, **kwargs)

    return told


@contextmanager
def recording() -> Iterator[Recorded]:
    """Of what is called within, in this thread."""
    run, call = Recorded(), nn.Module._call_impl

    def called(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run._called.append(self)
        try:
            return call(self, *args, **kwargs)
        finally:
            run._called.pop()

    nn.Module._call_impl = called  # not __call__, which stands for a tracer
    _runs.append(run)
    try:
        yield run
    finally:
        _runs.remove(run)
        nn.Module._call_impl = call
