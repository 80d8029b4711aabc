"""Builds of copies of the checkout with the installed setuptools, offline."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("bert_fast", "kernels", "tests", "bench", "docs", "examples", "csrc")
BUILD = """
import sys
from setuptools import build_meta
getattr(build_meta, sys.argv[1])(sys.argv[2])
assert "torch" not in sys.modules, "setup.py must not import torch"
"""


def copy_checkout(target: Path, folders: tuple[str, ...] = FOLDERS) -> None:
    """Without what earlier builds left in it."""
    for folder in folders:
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, target)


def run(*command: str, **options) -> subprocess.CompletedProcess[str]:
    """stdout and stderr as one text."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def try_build(what: str, source: Path, target: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`env` beside the environment here, from which nothing is taken that says whether and how CUDA code is built."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("BERT_FAST_CUDA", "CUDA_", "NVCC_"))}
    return run(sys.executable, "-c", BUILD, f"build_{what}", str(target), cwd=source, env=ours | env)


def build(what: str, source: Path, target: Path, **env: str) -> Path:
    target.mkdir(exist_ok=True)
    done = try_build(what, source, target, **env)
    assert done.returncode == 0, done.stdout[-3000:]
    (built,) = target.iterdir()
    return built


def build_module() -> ModuleType:
    """csrc/build_library.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("build_library", ROOT / "csrc/build_library.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
