"""The compiled CUDA library, csrc/*.cu as bert_fast/_C.abi3.so. Optional: where it is missing, nothing else changes."""

from __future__ import annotations

import functools
import runpy
from pathlib import Path

import torch

NAME = "_C.abi3.so"
NOT_BUILT = "csrc extension is not built"
OUTDATED = "csrc extension is of other sources than those in csrc/; build it again"


def path() -> Path | None:
    """The file, if there is one: in bert_fast/, which holds this folder or, in a checkout, stands beside it."""
    above = Path(__file__).resolve().parents[1]
    return next((file for file in (above / NAME, above / "bert_fast" / NAME) if file.is_file()), None)


def _sources() -> str | None:
    """Digest of csrc/ in a checkout; an installed package has no such folder, and came with its library."""
    script = Path(__file__).resolve().parents[1] / "csrc/build_library.py"
    return runpy.run_path(str(script))["sources_digest"]() if script.is_file() else None


@functools.cache
def load() -> str | None:
    """None once the library's ops are registered, else the reason why not.

    The file is opened once a process: torch's stable ABI ends a process that registers the same ops twice.
    """
    file, sources = path(), _sources()
    if file is None:
        return NOT_BUILT
    if sources is not None and sources.encode() not in file.read_bytes():  # before its ops are those of this process
        return OUTDATED
    try:
        torch.ops.load_library(str(file))
    except (OSError, RuntimeError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None
