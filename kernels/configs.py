"""Tile choices are data: one JSON per architecture beside this file, one frozen type, one pure lookup.

Keys are `op/shape class/dtype class`. An entry missing from the architecture's file comes from `generic.json`, whose
tiles fit the shared memory and registers of every GPU from sm_80 on and of gfx942.

A product's class is its rows and its form. Rows are named by their upper bound on the row *capacity* (the row count
itself is on the device); forms by where BERT's products differ: "wide" (768 -> 2304, 768 -> 3072), "narrow" (768 ->
768) and "narrow-long" (3072 -> 768), whose few tiles of much work each want the inner dimension split.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

ROW_CLASSES = (32, 128, 512, 1024, 2048, 8192)  # capacities up to these, and above
GRADIENT_ROWS = (1024, 8192)
NARROW = 1024  # columns up to which a product is narrow
LONG = 1024  # inner dimension above which a narrow product is long
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class TileConfig:
    """Tile of a matrix kernel. BLOCK_M rows x BLOCK_N columns (attention: keys) x BLOCK_K of the inner dimension."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    BLOCK_K: int = 0
    # Programs that share one output tile, each a part of the inner dimension (only where LayerNorm adds the parts).
    SPLIT_K: int = 1
    tma: bool = False  # host tensor descriptors: sm_90 and newer, half dtypes, aligned shapes
    # Registers of a thread (NVIDIA). 0: the assembler's choice, which may spill a few to fit one more block on an SM.
    max_registers: int = 0

    def __post_init__(self) -> None:
        for name in ("BLOCK_M", "BLOCK_N"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name}={size}: expected a power of two from 16 on")
        if self.tma and self.BLOCK_M < 64:
            raise ValueError(f"BLOCK_M={self.BLOCK_M} with tma: wgmma needs 64 rows")
        if self.SPLIT_K < 1 or (self.tma and self.SPLIT_K > 1):
            raise ValueError(f"SPLIT_K={self.SPLIT_K}, tma={self.tma}: expected 1 from the kernel with descriptors")

    def register_limit(self) -> dict[str, int]:
        """Triton's launch option for max_registers, which only its NVIDIA backend knows."""
        return {"maxnreg": self.max_registers} if self.max_registers and torch.version.hip is None else {}


def row_class(rows: int) -> str:
    for bound in ROW_CLASSES:
        if rows <= bound:
            return f"rows<={bound}"
    return f"rows>{ROW_CLASSES[-1]}"


def gemm_class(rows: int, columns: int, inner: int) -> str:
    """Shape class of a product of x (rows, inner) to `columns` columns, those of all its weights together."""
    form = "wide" if columns > NARROW else "narrow-long" if inner > LONG else "narrow"
    return f"{row_class(rows)} {form}"


def gradient_class(rows: int) -> str:
    """Shape class of the products of the backward: training has many rows, so by these alone."""
    few, many = GRADIENT_ROWS
    return f"rows<={few}" if rows <= few else f"rows<={many}" if rows <= many else f"rows>{many}"


def dtype_class(dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else "half"


@functools.cache
def table(arch: str) -> dict[str, TileConfig]:
    """All entries of `arch` ("sm90", ...), the generic ones where it has none of its own."""
    merged: dict[str, TileConfig] = {}
    for name in ("generic", arch):
        path = FOLDER / f"{name}.json"
        if path.exists():
            merged |= {key: TileConfig(**entry) for key, entry in json.loads(path.read_text()).items()}
    return merged


def arch_name(capability: tuple[int, int]) -> str:
    """Name of the table of a compute capability; an unknown architecture has no file and gets the generic tiles."""
    return f"sm{capability[0]}{capability[1]}"


def choose(op: str, shape: str, dtype: torch.dtype, capability: tuple[int, int]) -> TileConfig:
    """Tile of `op` for a shape class; pure: same arguments, same tile."""
    return table(arch_name(capability))[f"{op}/{shape}/{dtype_class(dtype)}"]
