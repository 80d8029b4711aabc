"""Timing in turns: the one way anything here is timed.

Every measurement is one block of calls: CUDA events around it on a GPU, the wall clock on a CPU, divided by the number
of calls. The providers take turns block by block, so that a noisy neighbour or a clock change falls on all alike.

Calls in a row on a GPU: while one runs the host enqueues the next, so a time is that of the slower of the two. `apart`
tells them from each other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

BLOCK_MS = {"cuda": 20.0, "cpu": 2.0}  # long enough that a clock's resolution and one launch do not count
GRAPH_CALLS = 20
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}  # well past the caches
GEMM_SIZE = {"cuda": 8192, "cpu": 2048}
APART_CALLS, APART_ROUNDS = 5, 10  # so few that they all fit in the queue of launches
APART_CYCLES = 100_000_000  # of the GPU's clock, about 50 ms
Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call: median, 20 % and 80 % quantiles over `rounds` blocks."""

    median: float
    q20: float
    q80: float
    rounds: int

    @classmethod
    def of(cls, times: list[float]) -> Timing:
        cuts = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
        return cls(statistics.median(times), cuts[0], cuts[3], len(times))


def _block(call: Callable[[], object], count: int, device: torch.device) -> float:
    """Milliseconds a call over `count` calls in a row."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count
    begin = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - begin) * 1e3 / count


def in_turns(
    calls: Calls, device: torch.device, rounds: int, graph: bool = False, problems: dict[str, str] | None = None
) -> dict[str, Timing]:
    """Times every call, a block each per round, starting with another one each round.

    graph: on a GPU, each call is captured GRAPH_CALLS times and the graph replayed, so that kernels are timed and not
    their launches. problems: where given, a call that fails to start is left out and the reason noted here.
    """
    per = GRAPH_CALLS if graph and device.type == "cuda" else 1
    ready: Calls = {}
    counts = {}
    for name, call in calls.items():
        try:
            ready[name] = _graphed(call, device) if per > 1 else call
            for _ in range(2):  # warm-up
                ready[name]()
            counts[name] = max(1, round(BLOCK_MS[device.type] / max(_block(ready[name], 1, device), 1e-3)))
        except Exception as problem:
            ready.pop(name, None)
            if problems is None:
                raise
            problems[name] = one_line(problem)
            if device.type == "cuda":
                torch.cuda.empty_cache()  # it may have been memory that ran out
    names = list(ready)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds if names else 0):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(_block(ready[name], counts[name], device) / per)
    return {name: Timing.of(ts) for name, ts in times.items()}


class Apart(NamedTuple):
    """Milliseconds a call, medians."""

    host_ms: float  # until the call has returned: it enqueues and waits for nothing
    gpu_ms: float | None  # with all kernels enqueued before the first one starts; None: not known


def apart(call: Callable[[], object], device: torch.device) -> Apart:
    """The host's and the GPU's share of a call: the GPU sleeps until a few are enqueued, then runs them in a row."""
    hosts, gpus = [], []
    for _ in range(APART_ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        torch.cuda._sleep(APART_CYCLES)
        start.record()
        begin = time.perf_counter()
        for _ in range(APART_CALLS):
            call()
        hosts.append((time.perf_counter() - begin) * 1e3 / APART_CALLS)
        end.record()
        if not start.query():  # else it woke too early, and waited for the host
            end.synchronize()
            gpus.append(start.elapsed_time(end) / APART_CALLS)
    return Apart(statistics.median(hosts), statistics.median(gpus) if gpus else None)


def _graphed(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # compilation and cuBLAS handles stay out of the capture
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            call()
    return graph.replay


def one_line(problem: BaseException) -> str:
    """An exception as a note in a table."""
    return " ".join(f"{type(problem).__name__}: {problem}".split())[:200]


def pick_device(kind: str | None) -> torch.device:
    """The device that `--device` names; without it the GPU where there is one."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench: --device cuda: this torch sees no CUDA device")
    on_gpu = torch.cuda.is_available() if kind is None else kind == "cuda"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches: bytes a second of a copy (read + written), FLOP a second of a square product."""
    size, count = GEMM_SIZE[device.type], COPY_BYTES[device.type] // 4
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    times = in_turns({"copy": lambda: target.copy_(source), "gemm": lambda: a @ b}, device, rounds=5)
    moved, work = 2 * 4 * count, 2 * size**3
    found = {"copy": moved / times["copy"].median * 1e3, "gemm": work / times["gemm"].median * 1e3}
    return found | {"gemm_size": size}


def higher(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Ceilings of a run from those at its two ends: a moment's disturbance must not lower what shares are of."""
    return {name: max(value, after[name]) for name, value in before.items()}


def say_ceilings(top: dict[str, float]) -> str:
    size = int(top["gemm_size"])
    return f"ceilings: copy {quantity(top['copy'], 'B/s')}, {size}³ GEMM {quantity(top['gemm'], 'FLOP/s')}"


def quantity(value: float, unit: str) -> str:
    """1.23e12 -> '1.23 TFLOP/s'."""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def peak_memory(call: Callable[[], object], device: torch.device) -> float | None:
    """MiB that a call allocates at its peak beyond what was held before it; pools kept by CUDA graphs are not in it."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return round((torch.cuda.max_memory_allocated(device) - held) / 2**20, 1)
