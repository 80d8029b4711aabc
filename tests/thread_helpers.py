"""Shared by the tests with threads and processes.

Threads switch every 10 us here. Each runs torch on one core, so that on the CPU results are equal bit for bit.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import test_families
import torch
from helpers import model_inputs, pair, tensors_of

import bert_fast

FLAGS = {"output_hidden_states": True, "output_attentions": True}
PADDING = ("auto", "exact", "skip")


@pytest.fixture
def often() -> Iterator[None]:
    interval, cores = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-5)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(cores)
    sys.setswitchinterval(interval)


def in_threads(*work: Callable[[], None]) -> None:
    """All at once; the first error of any is raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(work))

    def run(each: Callable[[], None]) -> None:
        torch.set_num_threads(1)
        try:
            start.wait()
            each()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(each,)) for each in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def accelerated(cls: str = "BertForSequenceClassification", **changes: Any) -> tuple[Any, Any]:
    """(transformers' model, a copy accelerated)."""
    upstream = test_families.pair(cls)[0] if cls in test_families.FAMILIES else pair(cls, **changes)[0]
    return upstream, bert_fast.accelerate(copy.deepcopy(upstream))


def modes_of_padding(cls: str) -> list[Any]:
    _, model = accelerated(cls)
    return [bert_fast.accelerate(copy.deepcopy(model), padding=padding) for padding in PADDING]


def with_gradients(model: Any, inputs: dict[str, Any], grad: bool) -> list[torch.Tensor]:
    """Outputs, and gradients of all parameters without touching their shared .grad."""
    with torch.set_grad_enabled(grad):
        outputs = [t for t in tensors_of(model(**inputs)).values() if t is not None]
        if not grad:
            return outputs
        parameters = list(model.parameters())
        slopes = torch.autograd.grad(sum(t.sin().sum() for t in outputs), parameters, allow_unused=True)
    return [t.detach() for t in outputs] + [g for g in slopes if g is not None]


CASES = [
    (model_inputs(B, S, kind, seed=B, **flags), grad)
    for B, S, kind, flags in (
        (3, 11, "right", {}), (1, 5, None, FLAGS), (4, 7, "holes", {"output_hidden_states": True}),
        (2, 16, "left", FLAGS), (3, 11, "ones", {}), (2, 9, "first", {"output_attentions": True}),
    )
    for grad in (False, True)
]  # fmt: skip
