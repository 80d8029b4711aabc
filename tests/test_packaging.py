"""What a release holds: an sdist that is a checkout, a wheel built from it, and metadata that an index takes."""

from __future__ import annotations

import email
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging_helpers import FOLDERS, ROOT, build, copy_checkout

import bert_fast

PURE = {"BERT_FAST_CUDA": "0"}  # with the CUDA library: tests/test_extension_build.py


def python_files(folder: str) -> set[str]:
    """Relative to the checkout, whichever sub-packages there are."""
    return {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py")}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that has been worked in, with bytecode in every folder and libraries that earlier builds left."""
    source = tmp_path_factory.mktemp("checkout")
    copy_checkout(source)
    for folder in FOLDERS:
        (source / folder / "__pycache__").mkdir()
        (source / folder / "__pycache__/old.cpython-311.pyc").write_bytes(b"")
    for name in ("bert_fast/_C.abi3.so", "kernels/old.so", "csrc/old.o", "csrc/old.so"):
        (source / name).write_bytes(b"")
    return source


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpacked."""
    target = tmp_path_factory.mktemp("sdist")
    built = build("sdist", checkout, target, **PURE)
    assert built.name == f"bert_fast-{bert_fast.__version__}.tar.gz"
    with tarfile.open(built) as archive:
        archive.extractall(target, filter="data")
    return target / f"bert_fast-{bert_fast.__version__}"


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    built = build("wheel", sdist, tmp_path_factory.mktemp("wheel"), **PURE)
    assert built.name == f"bert_fast-{bert_fast.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(built)


def test_sdist_is_a_checkout(sdist: Path) -> None:
    found = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    wanted = set().union(*(python_files(folder) for folder in FOLDERS))
    wanted |= {
        str(path.relative_to(ROOT)) for folder in ("kernels", "bench") for path in (ROOT / folder).rglob("*.json")
    }
    wanted |= {path.name for path in ROOT.iterdir() if path.suffix in (".md", ".txt", ".toml")}
    wanted |= {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir() if path.is_file() and path.suffix != ".so"}
    wanted |= {f"tests/{path.name}" for end in ("h", "cuh", "cpp", "cu") for path in (ROOT / "tests").glob(f"*.{end}")}
    wanted |= {"setup.py", "LICENSE", "Makefile", "bert_fast/py.typed", "docs/design.md"}
    assert not wanted - found
    assert not [name for name in found if "__pycache__" in name or name.endswith((".pyc", ".so", ".o"))]


def test_wheel_from_the_sdist(wheel: zipfile.ZipFile) -> None:
    """Every module and table, the marker of types, and nothing else; `kernels/` is installed as bert_fast.kernels."""
    ours = {name for name in python_files("bert_fast") if not name.startswith("bert_fast/kernels/")}
    kernels = {
        f"bert_fast/kernels/{path.name}" for end in ("py", "json") for path in (ROOT / "kernels").glob(f"*.{end}")
    }
    assert "bert_fast/__init__.py" in ours and "bert_fast/kernels/registry.py" in kernels
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == ours | kernels | {"bert_fast/py.typed"}
    for name in shipped:
        source = ROOT / name.removeprefix("bert_fast/") if name in kernels else ROOT / name
        assert wheel.read(name) == source.read_bytes(), name


def test_wheel_from_a_checkout_that_was_built_before(checkout: Path, wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    built = build("wheel", checkout, tmp_path / "dist", **PURE)
    assert built.name == f"bert_fast-{bert_fast.__version__}-py3-none-any.whl"
    assert set(zipfile.ZipFile(built).namelist()) == set(wheel.namelist())


def test_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = Metadata.from_email(wheel.read(name), validate=True)
    assert (metadata.name, str(metadata.version)) == ("bert-fast", bert_fast.__version__)
    assert metadata.license_expression == "Apache-2.0" and metadata.license_files == ["LICENSE"]
    assert metadata.description_content_type == "text/markdown" and metadata.description.startswith("# bert-fast")
    assert [version for version in ("3.9", "3.10", "3.13", "3.14") if version in metadata.requires_python] == [
        "3.10",
        "3.13",
    ]
    assert set(metadata.provides_extra or ()) == {"test", "bench", "embed", "ray"}
    plain = {requirement.name for requirement in metadata.requires_dist or () if "extra" not in str(requirement.marker)}
    assert plain == {"torch", "triton", "transformers", "numpy"}
    wheel_file = email.message_from_bytes(wheel.read(name.replace("METADATA", "WHEEL")))
    assert wheel_file["Root-Is-Purelib"] == "true"


def test_changelog_has_this_version() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first and first[1] == bert_fast.__version__


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-oldest.txt"])
def test_what_tests_need_is_pinned(constraints: str, wheel: zipfile.ZipFile) -> None:
    """make test and make test-oldest install the same versions tomorrow."""
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    requirements = Metadata.from_email(wheel.read(name), validate=True).requires_dist or []
    needed = {r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": "test"})}
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / constraints).read_text(), re.MULTILINE))
    unpinned = {"setuptools", "ruff", *(["matplotlib", "tqdm"] if "oldest" in constraints else [])}  # ruff: in pyproject
    assert needed - pinned <= unpinned
