"""A stand-in for CUDA in the tests of graphs.py: captures keep the closure, replays run it into the same outputs.

Copies of a replay go where those of a CUDA graph would: over what the graph returned at its capture. So whoever was
handed that memory, and not a copy, sees it change.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import helpers
import pytest
import torch

from bert_fast import graphs
from bert_fast.encoder import Encoded
from bert_fast.snapshot import snapshots


def tensors_of(encoded: Encoded) -> list[torch.Tensor]:
    pooled = [] if encoded.pooled is None else [encoded.pooled]
    return [encoded.last, *pooled, *encoded.hidden, *encoded.attentions]


class FakeGraph:
    def __init__(self, run: Any, outputs: Encoded) -> None:
        self.run, self.outputs = run, outputs


class FakeBackend:
    """idle: replays do nothing, for counting what Python costs; busy: work never finishes; broken: captures fail."""

    def __init__(self, device: torch.device) -> None:
        self.captures = self.replays = self.running = 0
        self.asked: list[bool] = []  # of every capture, whether with dependent launches
        self.idle = self.busy = self.broken = False
        self.capturing_elsewhere: str | None = None

    def guard(self) -> Any:
        return contextlib.nullcontext()

    def unavailable(self) -> str | None:
        return self.capturing_elsewhere

    def begin(self) -> None:
        self.running += 1
        assert self.running == 1, "two replays at once"

    def end(self, stream: None, graph: FakeGraph) -> None:
        self.running -= 1

    def capture(self, run: Any, dependent: bool) -> tuple[FakeGraph, Encoded]:
        self.asked.append(dependent)
        run()  # the warm-up
        if self.broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captures += 1
        outputs = run()
        return FakeGraph(run, outputs), outputs

    def replay(self, graph: FakeGraph) -> None:
        self.replays += 1
        if self.idle:
            return
        assert not torch.is_grad_enabled()
        with torch.inference_mode(False), torch.no_grad():
            for static, new in zip(tensors_of(graph.outputs), tensors_of(graph.run()), strict=True):
                static.copy_(new)

    def finished(self, graph: FakeGraph) -> bool:
        return not self.busy

    def pool_bytes(self) -> int:
        return 0


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBackend]:
    """Graphs on the CPU, through a FakeBackend of the test's own."""
    fake = FakeBackend(torch.device("cpu"))
    monkeypatch.setitem(graphs.BACKENDS, "cpu", lambda device: fake)
    monkeypatch.delenv("BERT_FAST_GRAPHS", raising=False)
    graphs._devices.pop(torch.device("cpu"), None)
    yield fake
    graphs._devices.pop(torch.device("cpu"), None)
    for _, snapshot in snapshots():  # of models that garbage collection has not come to yet
        snapshot.graphs = None


@pytest.fixture
def inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def directly(model: torch.nn.Module, **inputs: Any) -> Any:
    """The call without graphs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BERT_FAST_GRAPHS", "0")
        return model(**inputs)


def assert_equal(got: Any, want: Any) -> None:
    """Bit for bit."""
    got, want = helpers.tensors_of(got), helpers.tensors_of(want)
    assert list(got) == list(want)
    for name in want:
        assert got[name].shape == want[name].shape and torch.equal(got[name], want[name]), name


def with_empty(mask: torch.Tensor) -> torch.Tensor:
    mask[1] = 0
    return mask


def alive(model: torch.nn.Module) -> int:
    """Graphs held for the (first) BertModel in `model`."""
    held = [s.graphs for m, s in snapshots() if s.graphs is not None and any(m is part for part in model.modules())]
    return sum(len(g.entries) for g in held)
