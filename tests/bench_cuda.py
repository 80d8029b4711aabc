"""A CUDA device that is not there: what the bench asks of torch.cuda is answered, tensors stay on the CPU.

It finds crashes in code that only a GPU would reach (arguments, graph capture, memory, messages), not wrong numbers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from bert_fast import surroundings

DEVICE = torch.device("cuda", 0)


class _OnCpu(TorchFunctionMode):
    """Every device argument that names CUDA becomes the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def moved(value: Any) -> Any:
            return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value

        kwargs = {name: moved(value) for name, value in (kwargs or {}).items()}
        return func(*(moved(a) for a in args), **kwargs)


class _Event:
    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return False

    def elapsed_time(self, end: _Event) -> float:
        return (end.at - self.at) * 1e3 + 1e-3


class _Stream:
    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, other: Any) -> None:
        pass


PROPERTIES = SimpleNamespace(major=9, minor=0, multi_processor_count=4, total_memory=2**34)
ANSWERS: dict[str, Any] = {
    "is_available": lambda: True,
    "current_device": lambda: 0,
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "_sleep": lambda cycles: None,
    "get_device_name": lambda device=None: "Pretended GPU",
    "get_device_properties": lambda device=None: PROPERTIES,
    "get_device_capability": lambda device=None: (9, 0),
    "memory_allocated": lambda device=None: 2**20,
    "max_memory_allocated": lambda device=None: 2**21,
    "reset_peak_memory_stats": lambda device=None: None,
    "Event": _Event,
    "Stream": _Stream,
    "current_stream": _Stream,
    "stream": lambda stream: nullcontext(),
    "graph": lambda graph: nullcontext(),
    "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
}


@contextmanager
def pretended() -> Iterator[None]:
    with ExitStack() as patches:
        for name, answer in ANSWERS.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, answer))
        patches.enter_context(mock.patch.object(torch, "compile", lambda model, **options: model))
        patches.enter_context(mock.patch.object(surroundings, "mode_reason", lambda: None))  # of the mode that pretends
        patches.enter_context(_OnCpu())
        yield
