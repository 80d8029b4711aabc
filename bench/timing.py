"""Timing in turns, and the record of where it was taken.

Every measurement is one block of calls: CUDA events around it on a GPU, the wall clock on a CPU, divided by the number
of calls. The providers take turns block by block, so that a noisy neighbour or a clock change falls on all alike.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"
BLOCK_MS = {"cuda": 20.0, "cpu": 2.0}  # long enough that a clock's resolution and one launch do not count
GRAPH_CALLS = 20
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


def in_turns(calls: Calls, device: torch.device, rounds: int, graph: bool = False) -> dict[str, Timing]:
    """Times every call, a block each per round, starting with another one each round.

    graph: on a GPU, each call is captured GRAPH_CALLS times and the graph replayed, so that kernels are timed and not
    their launches.
    """
    per = GRAPH_CALLS if graph and device.type == "cuda" else 1
    calls = {name: _graphed(call, device) if per > 1 else call for name, call in calls.items()}
    counts = {}
    for name, call in calls.items():
        for _ in range(2):  # warm-up
            call()
        counts[name] = max(1, round(BLOCK_MS[device.type] / max(_block(call, 1, device), 1e-3)))
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            times[name].append(_block(calls[name], counts[name], device) / per)
    return {name: Timing.of(ts) for name, ts in times.items()}


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


def pick_device(kind: str | None) -> torch.device:
    """The device that `--device` names; without it the GPU where there is one."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench: --device cuda: this torch sees no CUDA device")
    on_gpu = torch.cuda.is_available() if kind is None else kind == "cuda"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def environment(device: torch.device, command: str) -> dict[str, object]:
    """What a number needs beside it to be read later."""
    record: dict[str, object] = {
        "device": device_name(device),
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in ("triton", "transformers")},
    }
    if device.type == "cuda":
        chip = torch.cuda.get_device_properties(device)
        record |= {
            "capability": f"{chip.major}.{chip.minor}",
            "multiprocessors": chip.multi_processor_count,
            "memory_gib": round(chip.total_memory / 2**30, 1),
            "allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        }
    else:
        record |= {"threads": torch.get_num_threads(), "cores": os.cpu_count()}
        if hasattr(os, "getloadavg"):
            record["load"] = round(os.getloadavg()[0], 2)
    return record


def busy(env: dict[str, object]) -> str:
    """A line for the reader when others are using the cores, else nothing."""
    load, cores = env.get("load"), env.get("cores")
    if not isinstance(load, float) or not isinstance(cores, int) or load < cores / 2:
        return ""
    return f"note: load {load} on {cores} cores before the first call; these times are of a busy machine\n"


def command_line(argv: list[str] | None = None) -> str:
    """The command, less `--out FILE`: where the record went is no part of it."""
    words = list(sys.argv[1:] if argv is None else argv)
    while "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    return " ".join(["python", "-m", "bench", *words])


def result_file(kind: str, device: torch.device) -> Path:
    """bench/results/<device>-<kind>-<date>.json"""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return RESULTS / f"{name}-{kind}-{datetime.date.today().isoformat()}.json"


def save(path: Path, env: dict[str, object], rows: list[dict[str, object]], **more: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = {"environment": env, **more, "rows": rows}
    path.write_text(json.dumps(payload, indent=1, default=asdict) + "\n")


@contextlib.contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[], object]]:
    """-> a function to call after each step; draws on a terminal that has tqdm, else nothing."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=total, desc=what, disable=None, leave=False) as bar:
        yield bar.update
