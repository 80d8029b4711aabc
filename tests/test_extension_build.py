"""setup.py and the CUDA library: when it is built, what stops a build, and that one file serves every way to install.

With a .cu of three lines in a copy of the checkout. What needs no compiler that works has a stand-in for nvcc.
"""

from __future__ import annotations

import email
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging_helpers import build, build_module, copy_checkout, run, try_build

import bert_fast

OP = """
#include <torch/csrc/stable/library.h>
int64_t next(int64_t x) { return x + 1; }
__attribute__((used)) static const char made_of[] = BERT_FAST_SOURCES;
STABLE_TORCH_LIBRARY(bert_fast_probe, m) { m.def("next(int x) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(bert_fast_probe, CompositeExplicitAutograd, m) { m.impl("next", TORCH_BOX(&next)); }
"""
BROKEN = "#error broken on purpose\n"
STAND_IN = """#!/bin/sh
echo "$@" >>"$0.log"
case "$*" in
  --version) echo "stand-in 1.0";;
  --list-gpu-code) echo sm_75 sm_80 sm_90 sm_120;;
  *broken.cu*) echo "broken.cu(1): warning: before it"; echo "broken.cu(1): error: broken on purpose"; exit 1;;
  *) while [ $# -gt 1 ]; do [ "$1" = -o ] && echo built >"$2"; shift; done;;
esac
"""
PURE_WHEEL = f"bert_fast-{bert_fast.__version__}-py3-none-any.whl"
PLATFORM = sysconfig.get_platform().replace("-", "_").replace(".", "_")
WHEEL = f"bert_fast-{bert_fast.__version__}-cp310-abi3-{PLATFORM}.whl"
LIBRARY = "bert_fast/_C.abi3.so"
USE = """
import bert_fast, torch
from bert_fast.kernels import extension
print(bert_fast.__file__, extension.path(), extension.load(), sep="\\n")
assert extension.load() is extension.load()
if extension.load() is None:
    print(torch.ops.bert_fast_probe.next(41))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the CUDA library is built on Linux only")


NVCC = build_module().find_nvcc()
REAL = {"BERT_FAST_CUDA": "1", "BERT_FAST_CUDA_ARCHS": "90a"}  # one target: quicker
if NVCC:
    REAL["CUDA_HOME"] = str(Path(NVCC).parents[1])
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc here")


def scratch(folder: Path, **sources: str) -> Path:
    """The checkout with these csrc/*.cu alone."""
    copy_checkout(folder, ("bert_fast", "kernels", "csrc"))
    for path in (folder / "csrc").iterdir():
        if path.suffix in (".cu", ".cuh", ".h"):
            path.unlink()
    for name, text in sources.items():
        (folder / f"csrc/{name}.cu").write_text(text)
    return folder


@pytest.fixture
def no_nvcc(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "empty").mkdir()
    return {"PATH": str(tmp_path / "empty")}


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """CUDA_HOME of an nvcc that does nothing but fail on broken.cu."""
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(STAND_IN)
    nvcc.chmod(0o755)
    return {"CUDA_HOME": str(tmp_path / "cuda"), "PATH": ""}


def compiled(stand_in: dict[str, str]) -> list[str]:
    """The commands that compiled since the last look."""
    log = Path(stand_in["CUDA_HOME"], "bin/nvcc.log")
    lines = [line for line in log.read_text().splitlines() if " -c " in line] if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def warnings(output: str) -> list[str]:
    return [line for line in output.splitlines() if "warning" in line and "bert-fast" in line]


def built_names(folder: Path) -> list[str]:
    (wheel,) = folder.glob("*.whl")
    return [wheel.name, *(name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so"))]


def wheel_headers(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        return email.message_from_bytes(archive.read(name))


@pytest.mark.parametrize("value", ["bad", "", "2"])
def test_other_values_are_refused(value: str, tmp_path: Path) -> None:
    done = try_build("wheel", scratch(tmp_path / "src"), tmp_path, BERT_FAST_CUDA=value)
    assert done.returncode != 0 and f"BERT_FAST_CUDA={value}: expected 0 " in done.stdout


def test_without_nvcc(no_nvcc: dict[str, str], tmp_path: Path) -> None:
    """1 names what is missing. auto says nothing: that is the normal case."""
    source = scratch(tmp_path / "src", op=OP)
    done = try_build("wheel", source, tmp_path, BERT_FAST_CUDA="1", **no_nvcc)
    assert done.returncode != 0 and "BERT_FAST_CUDA=1: no nvcc in $CUDA_HOME/bin" in done.stdout
    for name, env in {"auto": {"BERT_FAST_CUDA": "auto"}, "unset": {}}.items():
        (tmp_path / name).mkdir()
        done = try_build("wheel", source, tmp_path / name, **env, **no_nvcc)
        assert done.returncode == 0 and not warnings(done.stdout), done.stdout
        assert built_names(tmp_path / name) == [PURE_WHEEL]


def test_without_sources(stand_in: dict[str, str], tmp_path: Path) -> None:
    source = scratch(tmp_path / "src")
    assert build("wheel", source, tmp_path / "auto", **stand_in).name == PURE_WHEEL
    done = try_build("wheel", source, tmp_path, BERT_FAST_CUDA="1", **stand_in)
    assert done.returncode != 0 and "there is no csrc/*.cu" in done.stdout


def test_0_never_looks_for_nvcc(stand_in: dict[str, str], tmp_path: Path) -> None:
    source = scratch(tmp_path / "src", broken=BROKEN)
    assert build("wheel", source, tmp_path / "dist", BERT_FAST_CUDA="0", **stand_in).name == PURE_WHEEL
    assert not Path(stand_in["CUDA_HOME"], "bin/nvcc.log").exists()


@pytest.mark.parametrize("compiler", ["stand-in", pytest.param("nvcc", marks=needs_nvcc)])
def test_source_that_does_not_compile(compiler: str, stand_in: dict[str, str], tmp_path: Path) -> None:
    """1 fails with the compiler's words, auto warns once and builds what no nvcc would have built."""
    env = stand_in if compiler == "stand-in" else {"CUDA_HOME": REAL["CUDA_HOME"]}
    source = scratch(tmp_path / "src", broken=BROKEN)
    done = try_build("wheel", source, tmp_path, BERT_FAST_CUDA="1", **env)
    assert done.returncode != 0 and "broken on purpose" in done.stdout and "BERT_FAST_CUDA=1: " in done.stdout
    (tmp_path / "dist").mkdir()
    done = try_build("wheel", source, tmp_path / "dist", **env)
    assert done.returncode == 0, done.stdout
    (line,) = warnings(done.stdout)
    assert "error: " in line and "broken on purpose" in line and "BERT_FAST_CUDA=1 makes this an error" in line
    assert built_names(tmp_path / "dist") == [PURE_WHEEL]
    headers = wheel_headers(tmp_path / "dist" / PURE_WHEEL)
    assert (headers["Root-Is-Purelib"], headers.get_all("Tag")) == ("true", ["py3-none-any"])


def in_place(source: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = sys.executable, "setup.py", "-q", "build_ext", "--inplace"
    return run(*command, cwd=source, env={k: v for k, v in os.environ.items() if k not in REAL} | env)


def test_no_library_of_other_sources_stays(stand_in: dict[str, str], tmp_path: Path) -> None:
    source = scratch(tmp_path / "src", op=OP)
    for what, names in {"wheel": [WHEEL, LIBRARY], "editable": [WHEEL.replace("-cp", "-0.editable-cp")]}.items():
        (tmp_path / what).mkdir()
        build(what, source, tmp_path / what, **stand_in)
        assert built_names(tmp_path / what) == names
    assert (source / LIBRARY).is_file()
    (source / "csrc/broken.cu").write_text(BROKEN)
    assert build("wheel", source, tmp_path / "next", **stand_in).name == PURE_WHEEL
    assert built_names(tmp_path / "next") == [PURE_WHEEL]
    build("editable", source, tmp_path / "next editable", **stand_in)
    assert not (source / LIBRARY).exists()
    (source / LIBRARY).write_bytes(b"old")
    assert in_place(source, **stand_in).returncode == 0 and not (source / LIBRARY).exists()  # as make gpu-check does


def test_a_library_that_is_not_wanted_goes(stand_in: dict[str, str], tmp_path: Path) -> None:
    source = scratch(tmp_path / "src", op=OP)
    assert in_place(source, **stand_in).returncode == 0 and (source / LIBRARY).is_file()
    build("wheel", source, tmp_path / "wheel", BERT_FAST_CUDA="0", **stand_in)
    assert (source / LIBRARY).is_file()  # a wheel is none of its business
    build("editable", source, tmp_path / "editable", BERT_FAST_CUDA="0", **stand_in)
    assert not (source / LIBRARY).exists()


def test_only_what_changed_is_compiled(stand_in: dict[str, str], tmp_path: Path) -> None:
    source = scratch(tmp_path / "src", one="", two="")

    def sources(what: str = "wheel", **env: str) -> set[str]:
        folder = tmp_path / "dist"
        shutil.rmtree(folder, ignore_errors=True)
        build(what, source, folder, **stand_in, **env)
        return {word for line in compiled(stand_in) for word in line.split() if word.endswith(".cu")}

    both = {"csrc/one.cu", "csrc/two.cu"}
    assert sources() == both
    assert sources() == sources("editable") == set()
    (source / "csrc/two.cu").write_text("//")
    assert sources("editable") == {"csrc/two.cu"}
    (source / "csrc/three.cu").write_text("BERT_FAST_SOURCES")
    assert sources() == {"csrc/three.cu"}
    (source / "csrc/two.cu").write_text("// again")
    assert sources() == {"csrc/two.cu", "csrc/three.cu"}  # the latter says what all were
    (source / "csrc/three.cu").unlink()
    (source / "csrc/new.cuh").write_text("")
    assert sources() == both
    assert sources(NVCC_APPEND_FLAGS="-lineinfo") == both
    assert sources(BERT_FAST_CUDA_ARCHS="80") == both
    assert sources() == set()


def test_targets(stand_in: dict[str, str], tmp_path: Path) -> None:
    """Those of the list that nvcc knows, or those asked for."""
    source = scratch(tmp_path / "src", op=OP)
    build("wheel", source, tmp_path / "default", **stand_in)
    build("wheel", source, tmp_path / "asked", BERT_FAST_CUDA_ARCHS="75, 90a", **stand_in)
    default, asked = ([w for w in line.split() if w.startswith("-gencode")] for line in compiled(stand_in))
    assert default == [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("80", "90a", "120")]
    assert asked == [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ("75", "90a")]
    done = try_build("wheel", source, tmp_path, BERT_FAST_CUDA_ARCHS="sm_90", **stand_in)
    assert done.returncode != 0 and "BERT_FAST_CUDA_ARCHS: 'sm_90' is no target" in done.stdout
    done = try_build("wheel", source, tmp_path, BERT_FAST_CUDA_ARCHS="100", **stand_in)
    assert done.returncode == 0 and "does not know sm_100" in warnings(done.stdout)[0]


def test_where_torch_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = build_module()
    for name in ("purelib", "path", "base"):
        (tmp_path / name / "torch/include/torch/csrc/stable").mkdir(parents=True)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "path")])
    monkeypatch.setattr(site, "getsitepackages", lambda prefixes: [str(tmp_path / "base")])
    for name in ("purelib", "path", "base"):
        assert module.find_torch() == tmp_path / name / "torch"
        shutil.rmtree(tmp_path / name)
    with pytest.raises(module.CannotBuild, match="torch's headers are not in .*purelib: install torch>=2.11"):
        module.find_torch()


def use(python: str, **options) -> list[str]:
    """What USE prints in a fresh process."""
    done = run(python, "-c", USE, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def op_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scratch(tmp_path_factory.mktemp("op") / "src", op=OP)


@needs_nvcc
def test_wheel_with_the_library(op_checkout: Path, tmp_path: Path) -> None:
    wheel = build("wheel", op_checkout, tmp_path / "dist", **REAL)
    assert built_names(tmp_path / "dist") == [WHEEL, LIBRARY]
    headers = wheel_headers(wheel)
    tag = WHEEL.removeprefix(f"bert_fast-{bert_fast.__version__}-").removesuffix(".whl")
    assert (headers["Root-Is-Purelib"], headers.get_all("Tag")) == ("false", [tag])
    target = (tmp_path / "installed").resolve()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(target)}}
    package, library = str(target / "bert_fast/__init__.py"), str(target / LIBRARY)
    assert use(sys.executable, **options) == [package, library, "None", "42"]
    (target / LIBRARY).write_bytes(b"no library")
    where, file, reason = use(sys.executable, **options)
    assert (where, file) == (package, library) and "_C.abi3.so" in reason  # bert_fast is there all the same


@needs_nvcc
@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_editable(mode: str, op_checkout: Path, tmp_path: Path) -> None:
    """Into an environment that sees the packages of this one."""
    pytest.importorskip("pip")
    made = run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"))
    assert made.returncode == 0, made.stdout
    python = str(tmp_path / "venv/bin/python")
    (folder,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (folder / "packages.pth").write_text(sysconfig.get_path("purelib"))
    (op_checkout / LIBRARY).unlink(missing_ok=True)
    install = ["install", "--no-index", "--no-build-isolation", "--no-deps", "-e", str(op_checkout)]
    install += ["--config-settings", f"editable_mode={mode}"]
    env = os.environ | REAL
    done = run(sys.executable, "-m", "pip", "--python", python, *install, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stdout
    package, *rest = use(python, cwd=tmp_path)
    assert Path(package).is_relative_to(op_checkout) and rest == [str(op_checkout / LIBRARY), "None", "42"]
