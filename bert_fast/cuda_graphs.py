"""CUDA's part of graphs.py: capture into one memory pool per device, replay, and order between streams."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar
from weakref import WeakSet

import torch

from bert_fast.kernels.runtime import dependent_launches

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


def _own_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream for captures that nobody else is handed; its context must be current.

    torch's own are 32 a device, given out in turns: another thread that got the same one would have its kernels
    captured instead of run. Non-blocking, since work on the default stream must not touch a capture. Never destroyed.
    """
    stream, non_blocking = ctypes.c_void_p(), 1
    status = ctypes.CDLL("libcuda.so.1").cuStreamCreate(ctypes.byref(stream), non_blocking)
    if status:
        raise RuntimeError(f"cuStreamCreate: error {status}")
    return torch.cuda.ExternalStream(stream.value, device=device)


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
        self._last: torch.cuda.Event | None = None

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
        if self._last is not None:
            stream.wait_event(self._last)
        return stream

    def end(self, stream: torch.cuda.Stream, graph: CudaGraph) -> None:
        graph.done.record(stream)
        self._last = graph.done

    def replay(self, graph: CudaGraph) -> None:
        graph.graph.replay()

    def finished(self, graph: CudaGraph) -> bool:
        try:
            return graph.done.query()
        except RuntimeError:  # another thread is in a capture that forbids asking
            return False

    def capture(self, run: Callable[[], T], dependent: bool) -> tuple[CudaGraph, T]:
        """Capture `run` after one run outside, which compiles its kernels; nothing waits for the device.

        A new pool has a new stream, where nothing ever ran, so that cuBLAS takes the captures' workspace from the pool:
        one that an earlier run had made could be taken away by whoever clears cuBLAS's workspaces (torch.compile does).
        """
        if not self._alive:  # a pool ends with its last graph and cannot be entered again
            self._pool, self._side = torch.cuda.graph_pool_handle(), _own_stream(self.device)
        graph, side, current = CudaGraph(), self._side, torch.cuda.current_stream()
        assert side is not None
        with dependent_launches(self.device) if dependent else contextlib.nullcontext():
            run()
            with _capturing, _no_garbage_collection(), torch.cuda.stream(side):
                # torch resets a generator that all graphs share, on this stream: not under somebody's running graph
                side.wait_stream(current)
                try:
                    graph.graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                    try:
                        outputs = run()
                    finally:
                        graph.graph.capture_end()
                except Exception:
                    self._repair()
                    raise
        current.wait_stream(side)
        self._alive.add(graph)
        return graph, outputs

    def _repair(self) -> None:
        """After a failed capture: torch may be left in it. The pool is not entered again; graphs in it stay good."""
        self._alive = WeakSet()
        # its allocator; where it is not in the capture, the first of these raises and nothing is to be done
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
            torch._C._cuda_releasePool(self.device.index, self._pool)
        # and its random numbers, which nobody could draw any more: a capture that succeeds takes them out of it
        with contextlib.suppress(Exception), torch.cuda.stream(_own_stream(self.device)):
            x, other = torch.zeros(1, device=self.device), torch.cuda.CUDAGraph()
            other.capture_begin(capture_error_mode="thread_local")
            x.zero_()
            other.capture_end()

    def pool_bytes(self) -> int:
        if not self._alive:
            return 0
        pool = tuple(self._pool)
        return sum(s["total_size"] for s in torch.cuda.memory_snapshot() if tuple(s.get("segment_pool_id", ())) == pool)
