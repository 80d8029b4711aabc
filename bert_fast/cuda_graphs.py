"""CUDA's part of graphs.py: capture into one memory pool per device, replay, and order between streams."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar
from weakref import WeakSet

import torch

from bert_fast.kernels.runtime import dependent_launches

DEPENDENT_ROWS = 128  # up to here kernels are so short that starting them is a good part of their time
T = TypeVar("T")
_capturing = threading.Lock()  # one capture at a time in the process: each pauses the garbage collector


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection inside a capture might free some tensor's or graph's memory, which CUDA forbids there."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def launch_mode(device: torch.device, rows: int) -> AbstractContextManager[Any]:
    """How kernels are launched in the warm-up and the capture of a forward of `rows` rows: dependently where few."""
    return dependent_launches(device) if rows <= DEPENDENT_ROWS else contextlib.nullcontext()


class CudaGraph:
    """A captured graph. done: recorded behind its last replay and the copies of its outputs."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self.done = torch.cuda.Event()


class CudaBackend:
    """See graphs.Backend."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._alive: WeakSet[CudaGraph] = WeakSet()
        # An event, not the stream: by now that stream may be gone, or under somebody's capture.
        self._last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    def guard(self) -> AbstractContextManager[Any]:
        if torch.cuda.current_device() == self.device.index:
            return contextlib.nullcontext()
        return torch.cuda.device(self.device)

    def unavailable(self) -> str | None:
        if torch.version.hip is not None:
            return "graphs are for NVIDIA GPUs"
        return "the stream is under a capture" if torch.cuda.is_current_stream_capturing() else None

    def begin(self) -> torch.cuda.Stream:
        stream = torch.cuda.current_stream()
        if self._last is not None and self._last[0] != stream:
            stream.wait_event(self._last[1])
        return stream

    def end(self, stream: torch.cuda.Stream, graph: CudaGraph) -> None:
        graph.done.record(stream)
        self._last = (stream, graph.done)

    def replay(self, graph: CudaGraph) -> None:
        graph.graph.replay()

    def finished(self, graph: CudaGraph) -> bool:
        return graph.done.query()

    def capture(self, run: Callable[[], T], rows: int) -> tuple[CudaGraph, T]:
        """Capture `run` after one run outside, which compiles its kernels; nothing waits for the device.

        On a stream where nothing ever runs, so that cuBLAS takes the capture's workspace from the pool: one that an
        earlier run had made could be taken away by whoever clears cuBLAS's workspaces (torch.compile does).
        """
        if not self._alive:  # a pool ends with its last graph and cannot be entered again
            self._pool = torch.cuda.graph_pool_handle()
        self._side = self._side or torch.cuda.Stream(self.device)
        graph = CudaGraph()
        with _capturing, _no_garbage_collection(), launch_mode(self.device, rows):
            run()
            with torch.cuda.stream(self._side):
                graph.graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    outputs = run()
                finally:
                    self._end_capture(graph)
        self._alive.add(graph)
        return graph, outputs

    def _end_capture(self, graph: CudaGraph) -> None:
        try:
            graph.graph.capture_end()
        except Exception:
            # torch leaves its allocator in the capture then; where it did not, these raise and nothing is to be done
            with contextlib.suppress(Exception):
                torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
                torch._C._cuda_releasePool(self.device.index, self._pool)
            # and, in some versions, its random numbers, which nobody could draw any more: a capture that succeeds
            # takes them out of it
            with contextlib.suppress(Exception):
                x, other = torch.zeros(1, device=self.device), torch.cuda.CUDAGraph()
                other.capture_begin(capture_error_mode="thread_local")
                x.zero_()
                other.capture_end()
            raise

    def pool_bytes(self) -> int:
        if not self._alive:
            return 0
        pool = tuple(self._pool)
        return sum(s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s.get("segment_pool_id", ())) == pool)
