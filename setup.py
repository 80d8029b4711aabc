"""Where the packages lie, and the optional CUDA library; everything else is in pyproject.toml. Never imports torch.

The folder `kernels/` has no `__init__.py`, so that from the repository root it cannot shadow the library of that
name which transformers imports. It is installed as `bert_fast.kernels`; in a checkout, `bert_fast/kernels/__init__.py`
points there, and that file is not shipped.

csrc/*.cu become bert_fast/_C.abi3.so, which uses torch's stable ABI and nothing of Python's: one file serves every
Python, and every torch from 2.11 on. The environment says whether it is built:

    BERT_FAST_CUDA=auto       (default) where there is an nvcc; when the build fails, a line of warning and no library
    BERT_FAST_CUDA=1          always; when the build fails, so does the installation
    BERT_FAST_CUDA=0          never; one that an earlier build left in a checkout is removed
    BERT_FAST_CUDA_ARCHS=90a  only for these targets, as in sm_90a; a list
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
from build_library import CannotBuild, build, find_nvcc  # noqa: E402

MODE = os.environ.get("BERT_FAST_CUDA", "auto")
if MODE not in ("0", "1", "auto"):
    raise SystemExit(f"BERT_FAST_CUDA={MODE}: expected 0 (no CUDA library), 1 (build it or fail) or auto")

IN_PLACE = ROOT / "bert_fast/_C.abi3.so"


class BuildLibrary(build_ext):
    def run(self) -> None:
        self.goes_in_place = self.inplace or self.editable_mode  # setuptools clears `inplace` meanwhile
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        """The same name under every Python: the file is loaded by its path, never imported."""
        return os.path.join(*fullname.split(".")) + ".abi3.so"

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        try:
            build(library, Path(self.get_finalized_command("build").build_base, "csrc"))
        except CannotBuild as error:
            if MODE == "1":
                raise SystemExit(f"BERT_FAST_CUDA=1: {error}") from None
            loud = "BERT_FAST_CUDA=1 makes this an error, BERT_FAST_CUDA=0 does not try"
            print(f"warning: bert-fast without its CUDA library: {error.short()} ({loud})", file=sys.stderr)
            self.leave_out(library)

    def leave_out(self, library: Path) -> None:
        """A pure package after all. What an earlier build left is of other sources."""
        library.unlink(missing_ok=True)
        if self.goes_in_place:
            IN_PLACE.unlink(missing_ok=True)
        self.extensions = self.distribution.ext_modules = []
        if wheel := self.distribution.get_command_obj("bdist_wheel", create=False):
            wheel.root_is_pure = True


sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cu"))
can = sys.platform == "linux" and bool(sources) and find_nvcc() is not None
library = MODE == "1" or (MODE == "auto" and can)
abi3 = library and not sysconfig.get_config_var("Py_GIL_DISABLED")  # no such tag for free-threaded Pythons

if MODE == "0" and {"editable_wheel", "build_ext"} & set(sys.argv):  # what was asked not to be here
    IN_PLACE.unlink(missing_ok=True)

setup(
    packages=["bert_fast", "bert_fast.comparison", "bert_fast.families", "bert_fast.kernels"],
    package_dir={"bert_fast": "bert_fast", "bert_fast.kernels": "kernels"},
    package_data={"bert_fast": ["py.typed"], "bert_fast.kernels": ["*.json"]},
    include_package_data=False,
    ext_modules=[Extension("bert_fast._C", sources, py_limited_api=True)] if library else [],
    cmdclass={"build_ext": BuildLibrary},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if abi3 else {},
)
