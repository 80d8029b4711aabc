"""Copies of the installed transformers with something altered, and Python processes that import one.

A copy consists of links, but for the files that are altered and the folders that lead to them. Altering transformers
after its import would only show that a replaced function is noticed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from bert_fast import comparison, tiers
from bert_fast.family import Family

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = Path(transformers.__file__).parent
VERSION = "5.99.0"

Change = Callable[[str], str]


def original(name: str) -> str:
    """The text of a file of the installed transformers."""
    return (INSTALLED / name).read_text(encoding="utf-8")


def class_text(text: str, name: str) -> str:
    found = re.search(rf"^class {name}\(.*?(?=^[@\w]|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no class {name}"
    return found[0]


def replaced(*pairs: tuple[str, str], within: str = "") -> Change:
    """A change that puts another text in place of every occurrence; within: the name of a class."""

    def change(text: str) -> str:
        new = part = class_text(text, within) if within else text
        for old, other in pairs:
            assert re.search(old, new), f"{old!r} is not in {within or 'the file'}"
            new = re.sub(old, other, new)
        return text.replace(part, new)

    return change


def chained(*changes: Change) -> Change:
    def change(text: str) -> str:
        for each in changes:
            text = each(text)
        return text

    return change


def moved_out(name: str, module: str) -> Change:
    """A change that imports a class from another file, which `moved_class` writes."""

    def change(text: str) -> str:
        return text.replace(class_text(text, name), f"from .{module} import {name}\n\n\n")

    return change


def moved_class(family: str, name: str) -> str:
    return f"import torch\nfrom torch import nn\n\n\n{class_text(original(modeling_file(family)), name)}"


def modeling_file(family: str) -> str:
    return f"models/{family}/modeling_{family}.py"


def altered_copy(folder: Path, changes: dict[str, Change], also: dict[str, str] | None = None) -> Path:
    """A folder for PYTHONPATH with the installed transformers as version 5.99.0.

    changes: family -> what becomes of its modeling file; also: other files in transformers -> their text.
    """
    version = replaced((r'__version__ = "[^"]+"', f'__version__ = "{VERSION}"'))
    texts = {"__init__.py": version(original("__init__.py"))} | (also or {})
    texts |= {modeling_file(family): change(original(modeling_file(family))) for family, change in changes.items()}
    real = {Path("transformers") / parent for name in texts for parent in Path(name).parents}
    for inside in sorted(real):
        (folder / inside).mkdir(parents=True)
        for entry in (INSTALLED.parent / inside).iterdir():
            if inside / entry.name not in real:
                (folder / inside / entry.name).symlink_to(entry)
    for name, text in texts.items():
        target = folder / "transformers" / name
        target.unlink(missing_ok=True)
        target.write_text(text, encoding="utf-8")
    return folder


def run_python(copy: Path, cache: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What a script prints as JSON in its last line, and all that it wrote to stderr."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(copy), str(ROOT), str(ROOT / "tests")]),
        "PYTHONDONTWRITEBYTECODE": "1",  # the folders of compiled files are links to the installed ones
        "BERT_FAST_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture
def untested(monkeypatch, tmp_path) -> list[Family]:
    """The families compared, in order."""
    compared, real = [], comparison.compare

    def compare(family: Family) -> comparison.Verdict:
        compared.append(family)
        return real(family)

    monkeypatch.setenv("BERT_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(comparison, "_verdicts", {})
    monkeypatch.setattr(comparison, "compare", compare)
    monkeypatch.setattr(Family, "compare", comparison.difference)
    monkeypatch.setattr(tiers, "_warned", set())
    return compared


@pytest.fixture
def found(monkeypatch) -> list[str]:
    """What every comparison finds, at once."""
    texts: list[str] = []
    monkeypatch.setattr(comparison, "differences", lambda family: iter(texts))
    return texts
