"""Compiles csrc/*.cu into one library against torch's stable ABI. For setup.py. Never imports torch."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parent
TARGETS = "80 90a 100 120"  # code of sm_80 runs on 86 and 89 too, that of sm_100 on 103
FLAGS = "-std=c++17 -O3 -DNDEBUG -cudart static -Xcompiler -fPIC,-fvisibility=hidden".split()
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]  # the ABI of torch 2.11
FLAGS += ["-Xptxas", "-warn-spills"]  # only said; NVCC_APPEND_FLAGS="-Werror all-warnings" makes warnings errors
NVCC_READS = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")
CPUS = os.cpu_count() or 1


class CannotBuild(Exception):
    """Why: one line, or a command and below it what that printed."""

    def short(self) -> str:
        first, *printed = str(self).splitlines()
        lines = [line for line in printed if re.search("error|fatal", line)] or printed[-1:] or [first]
        return lines[0].strip()


def find_nvcc() -> str | None:
    homes = [os.path.join(os.environ[name], "bin") for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which("nvcc", path=os.pathsep.join([*homes, os.environ.get("PATH", "")]))


def find_torch() -> Path:
    """In the environment that is installed into; sysconfig names it even inside pip's build isolation."""
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    places += site.getsitepackages([sys.base_prefix])  # for a virtual environment that sees the system's packages
    found = [Path(place, "torch") for place in places if Path(place, "torch/include/torch/csrc/stable").is_dir()]
    if not found:
        raise CannotBuild(
            f"torch's headers are not in {places[0]}: install torch>=2.11 there first; an installer that builds with "
            "another Python needs --no-build-isolation"
        )
    return found[0]


def run(*command: str) -> str:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    except OSError as error:
        raise CannotBuild(f"{command[0]} does not run: {error}") from None
    if done.returncode:
        raise CannotBuild(f"{' '.join(command)}\n{done.stdout.strip() or f'exit status {done.returncode}'}")
    return done.stdout


def gencode(nvcc: str) -> list[str]:
    known = set(re.findall(r"\d+", run(nvcc, "--list-gpu-code")))
    asked = os.environ.get("BERT_FAST_CUDA_ARCHS", "").replace(",", " ").split()
    if wrong := [arch for arch in asked if not re.fullmatch(r"\d+[af]?", arch)]:
        raise SystemExit(f"BERT_FAST_CUDA_ARCHS: {wrong[0]!r} is no target, expected a list such as {TARGETS!r}")
    if unknown := [arch for arch in asked if arch.rstrip("af") not in known]:
        raise CannotBuild(f"BERT_FAST_CUDA_ARCHS: {nvcc} does not know sm_{unknown[0]}")
    archs = asked or [arch for arch in TARGETS.split() if arch.rstrip("af") in known]
    if not archs:
        raise CannotBuild(f"{nvcc} knows none of the targets {TARGETS}")
    return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]


def sources_digest() -> str:
    """Of all that the library is made of; it carries it, and kernels/extension.py compares."""
    files = sorted(path for path in CSRC.iterdir() if path.suffix in (".cu", ".cuh", ".h"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]


def build(library: Path, folder: Path) -> None:
    """Objects stay in `folder` under a hash of what made them, so that only what changed is compiled again.

    torch is not in that hash: the ABI asked for is the same whichever torch's headers are read.
    """
    sources = sorted(CSRC.glob("*.cu"))
    if not sources or sys.platform != "linux":
        raise CannotBuild("it is built on Linux only" if sources else "there is no csrc/*.cu")
    if not (nvcc := find_nvcc()):
        raise CannotBuild("no nvcc in $CUDA_HOME/bin, in $CUDA_PATH/bin or on PATH")
    torch = find_torch()
    flags = [*FLAGS, *gencode(nvcc)]
    threads = max(1, CPUS // len(sources))  # for the targets of one source
    made_by = [run(nvcc, "--version"), *flags, *(os.environ.get(name, "") for name in NVCC_READS)]
    headers = [path.read_bytes() for path in sorted([*CSRC.glob("*.cuh"), *CSRC.glob("*.h")])]
    common = b"\0".join([*(text.encode() for text in made_by), *headers])
    made_of = f'-DBERT_FAST_SOURCES="{sources_digest()}"'
    folder.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        text = source.read_bytes()
        own = [made_of] if b"BERT_FAST_SOURCES" in text else []
        digest = hashlib.sha256(b"\0".join([common, text, *(flag.encode() for flag in own)])).hexdigest()[:16]
        whole = folder / f"{source.stem}-{digest}.o"
        if not whole.exists():
            part = folder / f"{whole.name}.{os.getpid()}"  # renamed when done: another build may run beside this one
            command = [nvcc, *flags, *own, f"--threads={threads}", f"-I{torch / 'include'}"]
            print(run(*command, "-c", os.path.relpath(source), "-o", str(part)), end="", flush=True)
            part.replace(whole)
        return whole

    with ThreadPoolExecutor(min(CPUS, len(sources))) as pool:
        objects = [str(path) for path in pool.map(compiled, sources)]
    run(nvcc, "-shared", *flags, *objects, f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-o", str(library))
