"""What a comparison found, kept in the user's cache folder: one small file a family.

A file counts for the versions and for the very sources that were compared, transformers' and ours; any other one, or
one that cannot be read, is as good as none. A folder that cannot be written to keeps nothing.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from bert_fast.family import Family
from bert_fast.kernels import runtime

# beside the files whose names a modeling file imports
_ALSO_CALLED = ("configuration_utils", "masking_utils", "integrations.sdpa_attention")
_ALSO_CALLED += ("utils.output_capturing", "utils.generic")


class Kept(NamedTuple):
    """A verdict: how a family differs, or None."""

    difference: str | None


def folder() -> Path:
    """Of the user's cache: $BERT_FAST_CACHE, else bert_fast in $XDG_CACHE_HOME or in ~/.cache."""
    own, shared = os.environ.get("BERT_FAST_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else Path(shared or Path.home() / ".cache") / "bert_fast"


def read(family: Family) -> Kept | None:
    try:
        kept = json.loads(_path(family).read_text(encoding="utf-8"))
        difference = kept["difference"]
    except (OSError, RuntimeError, ValueError, TypeError, KeyError):
        return None
    return Kept(difference) if difference is None or isinstance(difference, str) else None


def write(family: Family, difference: str | None) -> None:
    """Whole under its name, or not at all."""
    try:
        path = _path(family)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            json.dump({"versions": _versions(), "difference": difference}, file)
        os.replace(file.name, path)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        pass


def _versions() -> dict[str, str]:
    return {"transformers": transformers.__version__, "torch": torch.__version__, "python": platform.python_version()}


def _path(family: Family) -> Path:
    digest = hashlib.sha256(json.dumps(_versions()).encode())
    digest.update(_own_digest())
    digest.update(_digest(_upstream_files(family)))
    return folder() / f"{family.model.__name__}-{digest.hexdigest()[:32]}.json"


def _upstream_files(family: Family) -> set[Path]:
    """The modeling file of a family, those of transformers that what it imports is defined in, and a few more."""
    names = {getattr(value, "__module__", None) for value in vars(family.hf).values()}
    names = {name for name in names if isinstance(name, str) and name.startswith("transformers.")}
    names |= {family.hf.__name__, *(f"transformers.{name}" for name in _ALSO_CALLED)}
    return {Path(file) for name in names if (file := getattr(sys.modules.get(name), "__file__", None))}


@functools.cache
def _own_digest() -> bytes:
    package = Path(__file__).parents[1]
    return _digest(file for folder in (package, Path(runtime.__file__).parent) for file in folder.rglob("*.py"))


def _digest(files: Iterable[Path]) -> bytes:
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.parts[-3:]):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.digest()
