"""csrc/encoder_small.cuh compiled for the CPU (encoder_small_emulated.cpp), with the op's own arguments."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from bert_fast.kernels.encoder_small import VECTORS, WEIGHTS

HERE = Path(__file__).resolve().parent
COMPILER = (shutil.which("c++") or shutil.which("g++")) if sys.platform == "linux" else None  # ucontext, mmap
NO_COMPILER = "no C++ compiler (c++ or g++ on Linux)"
FLAGS = "-std=c++17 -O2 -fno-strict-aliasing -fPIC -shared".split()
PLAN = ("blocks", "groups", "round", "unit", "stages", "x_units", "region_bytes", "shared_bytes")
SHARED_LIMITS = {80: 166912, 90: 232448, 100: 232448, 120: 101376}  # bytes a block, by architecture


@dataclass(frozen=True)
class Launch:
    """What the emulated GPU is: blocks at once, shared memory of a block, clusters, and the seed of the schedule."""

    blocks: int = 8
    shared_limit: int = SHARED_LIMITS[90]
    clusters: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    intermediate: int
    heads: int
    B: int
    S: int


@functools.cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "encoder_small.so"
        subprocess.run([COMPILER, *FLAGS, HERE / "encoder_small_emulated.cpp", "-o", file], check=True)
        loaded = ctypes.CDLL(str(file))
    loaded.run.restype = loaded.plan.restype = ctypes.c_char_p
    loaded.stages.restype = loaded.stores.restype = loaded.probabilities.restype = ctypes.c_int64
    return loaded


def numbers(shape: Shape, launch: Launch, activation: int = 0, uniform_empty: bool = False, half: bool = False):
    """struct Numbers of encoder_small_emulated.cpp."""
    values = (*astuple(shape), activation, uniform_empty, half, *astuple(launch))
    return ctypes.byref((ctypes.c_int64 * len(values))(*values))


def encoder_small_emulated(
    x: torch.Tensor, token: torch.Tensor, cu_seqlens: torch.Tensor, kv_len: torch.Tensor,
    parameters: Sequence[torch.Tensor], eps: Sequence[float], heads: int, scale: float, activation: int,
    uniform_empty: bool, want_hidden: bool, want_probs: bool, launch: Launch | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Outputs as the op's; what the kernel does not write stays NaN. Raises RuntimeError with what went wrong."""
    (T, hidden), B, layers = x.shape, kv_len.shape[0], len(parameters) // (WEIGHTS + VECTORS)
    shape = Shape(layers, hidden, parameters[4].shape[0], heads, B, T // B)
    sizes = (T, hidden), (layers - 1, T, hidden), (layers, B, heads, T // B, T // B)
    wanted = True, want_hidden, want_probs
    nan = float("nan")
    outputs = [x.new_full(size if yes else (0,), nan) for size, yes in zip(sizes, wanted, strict=True)]
    tensors = (x, token, cu_seqlens, kv_len, *outputs, *parameters)
    assert all(t.is_contiguous() for t in tensors)
    pointers = [t.data_ptr() if t.numel() else None for t in tensors]
    given = numbers(shape, launch or Launch(), activation, uniform_empty, x.dtype == torch.float16)
    problem = library().run(
        given, ctypes.c_double(scale), (ctypes.c_double * len(eps))(*eps), (ctypes.c_void_p * len(pointers))(*pointers)
    )
    if problem:
        raise RuntimeError(problem.decode())
    return tuple(outputs)


def plan(shape: Shape, launch: Launch) -> dict[str, int]:
    """Raises RuntimeError with the reason where there is none."""
    found = (ctypes.c_int * len(PLAN))()
    problem = library().plan(numbers(shape, launch), found)
    if problem:
        raise RuntimeError(problem.decode())
    return dict(zip(PLAN, found, strict=True))


def _table(function: str, columns: int, room: int, *args) -> torch.Tensor:
    rows = torch.empty(room, columns, dtype=torch.int32)
    count = getattr(library(), function)(*args, ctypes.c_void_p(rows.data_ptr()), ctypes.c_int64(room))
    assert count < room
    return rows[:count].long()


def stages(shape: Shape, launch: Launch) -> torch.Tensor:
    """(n, 6): block, layer, product, tile, first step, steps; every stage of every block's ring in order."""
    return _table("stages", 6, 200_000, numbers(shape, launch))


def stores(shape: Shape, launch: Launch, rows: int) -> torch.Tensor:
    """(n, 5): block, layer, product, tile, row; every store of a product."""
    return _table("stores", 5, 1_000_000, numbers(shape, launch), ctypes.c_int(rows))


def probabilities(shape: Shape, launch: Launch) -> torch.Tensor:
    """(n, 3): block, layer, head; every head whose probabilities a block stores."""
    return _table("probabilities", 3, 10_000, numbers(shape, launch))
