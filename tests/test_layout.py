"""The house rules: where the packages lie and which way imports point."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "bert_fast.kernels": "kernels",
    "bert_fast.comparison": "bert_fast/comparison",
    "bert_fast.families": "bert_fast/families",
    "bert_fast": "bert_fast",
    "bench": "bench",
}
STUB = '''
from unittest.mock import MagicMock

class Any(MagicMock):
    def __call__(self, *args, **kwargs):  # as a decorator it returns what it decorates
        return args[0] if args and isinstance(args[0], type) else Any()

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Any()
'''
IMPORTS = """
import transformers, bert_fast, bert_fast.kernels.runtime as runtime
transformers.BertModel  # loads transformers' integrations, which import the library
from transformers.utils.import_utils import is_kernels_available
print(is_kernels_available(), bert_fast.__file__, runtime.__file__, sep="\\n")
"""


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file of the modules directly in a package."""
    files = sorted((ROOT / FOLDERS[package]).glob("*.py"))
    return {package if f.stem == "__init__" else f"{package}.{f.stem}": f for f in files}


LIBRARY = {name: path for package in FOLDERS if package != "bench" for name, path in modules(package).items()}


def imports(name: str, path: Path) -> Iterator[str]:
    """Absolute names of what a module imports, at any depth, but under `if TYPE_CHECKING`."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"), str(path))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo += node.orelse
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*up, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def module_of(name: str) -> str | None:
    """The library module that an imported name stands in or is."""
    return next((m for m in (name, name.rpartition(".")[0]) if m in LIBRARY), None)


def run(*command: str, path: str | Path = "", **options) -> str:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(path), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(command, capture_output=True, text=True, env=env, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_no_package_file_that_shadows() -> None:
    for folder in ("kernels", "tests"):
        assert not list((ROOT / folder).rglob("__init__.py")), f"{folder}/ must not be a package"
    assert not [d for d in (ROOT / "tests").iterdir() if d.is_dir() and list(d.rglob("*.py"))], "tests/ is flat"


@pytest.mark.parametrize("hub", [False, True], ids=["plain", "with-kernels-library"])
def test_import_from_the_root(hub: bool, tmp_path: Path) -> None:
    """The stub stands for the library named `kernels`; transformers must find it, and bert_fast its own folder."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    if hub:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels/__init__.py").write_text(STUB)
        (tmp_path / "kernels-0.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
        (tmp_path / "kernels-0.dist-info/METADATA").write_text(metadata)
    available, package, runtime = run(sys.executable, "-c", IMPORTS, path=tmp_path, cwd=ROOT).split("\n")[:3]
    assert available == "True" or not hub  # without the stub the real library may be there
    assert Path(package) == ROOT / "bert_fast/__init__.py"
    assert Path(runtime) == ROOT / "kernels/runtime.py"


def test_imports_point_one_way() -> None:
    for name, path in LIBRARY.items():
        for target in imports(name, path):
            top = target.partition(".")[0]
            assert top not in ("bench", "tests", "conftest") and not top.startswith("test_"), f"{name} imports {target}"
            if name.startswith("bert_fast.kernels"):
                assert top != "transformers", f"{name} imports {target}"
                assert top != "bert_fast" or target.startswith("bert_fast.kernels."), f"{name} imports {target}"
    for name, path in modules("bench").items():
        for target in imports(name, path):
            assert not target.startswith(("tests", "conftest", "test_")), f"{name} imports {target}"


def test_no_import_circle() -> None:
    graph = {name: {module_of(t) for t in imports(name, path)} - {None, name} for name, path in LIBRARY.items()}
    assert any(graph.values())
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


def test_arguments_of_transformers_are_named_in_one_place() -> None:
    """A release may rename them; demo.py calls models as a user does."""
    from bert_fast.family import FAMILIES
    from bert_fast.installed import FLAGS, Signature

    names = {"past_key_values", "past_key_values_length", "use_cache", "is_causal", "num_items_in_batch", *FLAGS}
    for family in FAMILIES:
        for cls in (family.model, family.embeddings_class, *family.layer_classes.values()):
            names |= Signature(cls.forward).spelled.keys()
    names -= {"hidden_states", "input"}  # a field of outputs, and a word
    assert len(names) > 15
    for name, path in LIBRARY.items():
        if name in ("bert_fast.installed", "bert_fast.demo") or name.startswith("bert_fast.kernels"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)} & names
        assert not found, f"{name} spells {found}"


def test_no_long_file() -> None:
    lines = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8").count("\n") for p in LIBRARY.values()}
    assert not (long := {name: n for name, n in lines.items() if n > 400}), f"over 400 lines: {long}"
