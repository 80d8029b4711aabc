"""`python -m bench aot`: compile the shipped kernels for GPUs that are not here, and judge the machine code.

The launchers of kernels/ are called on meta tensors with every kernel replaced by a recorder, so that what is compiled
is what they would launch: their choice of tile for the target (kernels/configs.py), their arguments, specialised as
Triton specialises them. The calls are those of bench/aot_calls.py and bench/aot_training.py; a kernel that none of them
launches, or an entry of kernels/*.json that none of them reaches, is an error. Without --all, the first call of each op
is taken, of those that only training has for two targets.

A build fails on a compiler error, a spill, shared memory above the limit of a chip that would run that tile, and, for
a matrix kernel in a half dtype, no tensor-core instruction (sm_90 with BLOCK_M >= 64: no wgmma).
Results are kept in .aot_cache/ by kernel source, Triton version and build.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import inspect
import itertools
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import bert_fast.kernels
from bert_fast.kernels import configs
from bert_fast.kernels.runtime import TensorDescriptor, triton

from .aot_calls import INTEGERS, Call, calls
from .aot_training import training_calls

CACHE = Path(__file__).resolve().parents[1] / ".aot_cache"
# target -> chips that run its code and, unless they have a table of their own, its tiles -> bytes of shared memory
# (LDS) a block may use
SHARED = {
    "80": {"sm80": 166912, "sm86": 101376, "sm89": 101376},
    "90": {"sm90": 232448},
    "100": {"sm100": 232448},
    "120": {"sm120": 101376},
    "gfx942": {"gfx942": 65536},
}
FEW_TARGETS = ("80", "90")  # for which training is compiled without --all
SHOWN = ("num_warps", "num_stages")  # options in the tile column
TENSOR_MEMORY = 512  # columns, sm_100
TYPES = INTEGERS | {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
INSTRUCTIONS = {"wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync", "tcgen05": r"tcgen05\.mma", "mfma": r"v_mfma"}
INSTRUCTIONS |= {"tma": r"cp\.async\.bulk\.tensor"}
WIDTHS = {"op": 19, "variant": 36, "target": 6, "tile": 18, "regs": 4, "LDL": 3, "STL": 3, "shared": 6, "limit": 6}
WIDTHS |= {"wgmma": 5, "mma": 4, "tcgen05": 7, "mfma": 4, "tma": 3, "s": 5, "verdict": 0}
Launch = tuple[Any, tuple, dict[str, Any]]  # kernel, arguments, keyword arguments


@dataclass(frozen=True)
class Build:
    """One kernel, specialised, for one target."""

    op: str
    variant: str
    target: str
    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[int, ...]  # places of the arguments that are multiples of 16
    options: dict[str, Any]
    limit: int  # shared memory of the smallest chip that would run it

    @property
    def identity(self) -> str:
        """What the compiler sees."""
        return repr(dataclasses.replace(self, op="", variant="", limit=0))

    @property
    def tile(self) -> str:
        sizes = [str(n) for name, n in self.constants.items() if name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_S")]
        return " ".join(["x".join(sizes), *(f"{name[4]}{n}" for name, n in self.options.items() if name in SHOWN)])


class Recorder:
    """Stands in for a kernel: `kernel[grid](...)` is noted and not launched."""

    def __init__(self, fn: Any, launches: list[Launch]) -> None:
        self.fn, self.launches = fn, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self.launches.append((self.fn, args, kwargs))


def kernel_modules() -> list[Any]:
    names = sorted(m.name for m in pkgutil.iter_modules(bert_fast.kernels.__path__))
    return [importlib.import_module(f"bert_fast.kernels.{name}") for name in names]


def kernels(module: Any) -> list[str]:
    return [n for n, fn in vars(module).items() if n.endswith("_kernel") and isinstance(fn, triton.JITFunction)]


def record(call: Call, target: str) -> tuple[list[Launch], list[tuple[str, str]]]:
    """The launches of a call on a GPU of that target, and the tiles it asked for: (architecture, table key)."""
    launches: list[Launch] = []
    keys: list[tuple[str, str]] = []
    real = (0, 0) if target.startswith("gfx") else divmod(int(target), 10)

    def choose(op: str, shape: str, dtype: torch.dtype, capability: tuple[int, int]) -> configs.TileConfig:
        keys.append((configs.arch_name(capability), f"{op}/{shape}/{configs.dtype_class(dtype)}"))
        return configs.choose(op, shape, dtype, capability)

    with ExitStack() as patches:
        for module in kernel_modules():
            new: dict[str, Any] = {name: Recorder(getattr(module, name), launches) for name in kernels(module)}
            if module is not configs and hasattr(module, "choose"):
                new["choose"] = choose
            if hasattr(module, "capability"):
                new["capability"] = lambda device: real
            if new:
                patches.enter_context(mock.patch.multiple(module, **new))
        matmul = torch.backends.cuda.matmul
        patches.callback(setattr, matmul, "fp32_precision", matmul.fp32_precision)
        matmul.fp32_precision = "tf32" if call.dtype == "tf32" else "ieee"
        call.run()
    return launches, keys


def specialise(fn: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """One launch as Triton's launcher specialises it; what is no argument of the kernel is an option."""
    given = dict(zip(fn.arg_names, args, strict=False)) | kwargs
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    divisible = []
    for i, p in enumerate(fn.params):
        value = given.pop(p.name)
        by_value, by_alignment = not p.do_not_specialize, not p.do_not_specialize_on_alignment
        if p.is_constexpr or value is None or (by_value and type(value) is int and value == 1):
            signature[p.name], constants[p.name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[p.name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            signature[p.name] = "fp32"
        else:
            pointer = isinstance(value, torch.Tensor)
            signature[p.name] = "*" + TYPES[value.dtype] if pointer else "i32" if abs(value) < 2**31 else "i64"
            if by_value and by_alignment and (pointer or value % 16 == 0):
                divisible.append(i)
    return dict(signature=signature, constants=constants, divisible=tuple(divisible), options=given)


def shared_limit(target: str, tiles: Iterable[tuple[str, str]]) -> int:
    """The least shared memory among the chips that run this target's code with these tiles."""
    first = next(iter(SHARED[target]))
    same = [
        size
        for chip, size in SHARED[target].items()
        if all(configs.table(chip)[key] == configs.table(first)[key] for arch, key in tiles if arch == first)
    ]
    return min(same)


def all_builds() -> tuple[list[Build], list[str]]:
    """Every build once, and what the table of calls misses."""
    todo = {getattr(module, name) for module in kernel_modules() for name in kernels(module)}
    entries = {p.stem: set(json.loads(p.read_text())) for p in configs.FOLDER.glob("*.json")}
    left = {(name, key) for name, keys in entries.items() for key in keys}
    builds: dict[str, Build] = {}
    for call, target in itertools.product([*calls(), *training_calls()], SHARED):
        launches, tiles = record(call, target)
        left -= {(arch if key in entries.get(arch, ()) else "generic", key) for arch, key in tiles}
        for fn, args, kwargs in launches:
            todo.discard(fn)
            where = (call.op, f"{call.dtype} {call.shape}", target, fn.__module__, fn.__name__)
            build = Build(*where, **specialise(fn, args, kwargs), limit=shared_limit(target, tiles))
            builds.setdefault(build.identity, build)
    missed = sorted(f"{fn.__module__}.{fn.__name__} is never launched" for fn in todo)
    return list(builds.values()), missed + [f"{name}.json: nothing reaches {key}" for name, key in sorted(left)]


def measure(build: Build) -> dict[str, Any]:
    """Compile, then read the machine code; {"error": ...} where the compiler fails."""
    fn = getattr(importlib.import_module(build.module), build.kernel)
    hip = build.target.startswith("gfx")
    target = GPUTarget("hip", build.target, 64) if hip else GPUTarget("cuda", int(build.target), 32)
    attrs = {(i,): [["tt.divisibility", 16]] for i in build.divisible}
    source = ASTSource(fn=fn, signature=build.signature, constexprs=build.constants, attrs=attrs)
    start = time.perf_counter()
    try:
        k = triton.compile(source, target=target, options=build.options)
    except Exception as e:  # whatever the compiler raises is the finding
        return {"error": f"{type(e).__name__}: {' '.join(str(e).split())[-200:]}"}
    row = {"s": time.perf_counter() - start, "shared": k.metadata.shared, "tmem": getattr(k.metadata, "tmem_size", 0)}
    text = k.asm["amdgcn" if hip else "ptx"]
    row |= {name: len(re.findall(pattern, text)) for name, pattern in INSTRUCTIONS.items()}
    if hip:
        counts = {"regs": "vgpr_count", "LDL": "vgpr_spill_count", "STL": "private_segment_fixed_size"}
        return row | {name: int(re.search(rf"\.{field}:?\s+(\d+)", text)[1]) for name, field in counts.items()}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(k.asm["cubin"])
        f.flush()
        usage = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", f.name], capture_output=True, text=True)
        sass = subprocess.run([knobs.nvidia.nvdisasm.path, "-c", f.name], capture_output=True, text=True, check=True)
    row["regs"] = int(re.search(r"REG:(\d+)", usage.stdout + usage.stderr)[1])
    return row | {name: len(re.findall(rf"\b{name}\b", sass.stdout)) for name in ("LDL", "STL")}


def verdict(build: Build, row: dict[str, Any]) -> str:
    """What is wrong with a build; empty: nothing."""
    if "error" in row:
        return row["error"]
    faults = []
    if row["LDL"] or row["STL"]:
        faults.append("spills")
    if row["shared"] > build.limit:
        faults.append(f"shared memory past {build.limit}")
    if (row["tmem"] or 0) > TENSOR_MEMORY:
        faults.append(f"tensor memory past {TENSOR_MEMORY}")
    if "BLOCK_M" in build.constants and any("bf16" in t or "fp16" in t for t in build.signature.values()):
        if not any(row[name] for name in ("wgmma", "mma", "tcgen05", "mfma")):
            faults.append("no tensor-core instruction")
        elif build.target == "90" and build.constants["BLOCK_M"] >= 64 and not row["wgmma"]:
            faults.append("no wgmma")
    return ", ".join(faults)


def cached(build: Build, key: str) -> dict[str, Any]:
    path = CACHE / f"{key}.json"
    if path.exists():
        return json.loads(path.read_text()) | {"cached": True}
    row = measure(build)
    if "error" not in row:
        CACHE.mkdir(exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(row))
        part.replace(path)  # never half a file, whatever ends this process
    return row


def cache_key(build: Build) -> str:
    fn = getattr(importlib.import_module(build.module), build.kernel)
    parts = (triton.__version__, inspect.getsource(measure), repr(INSTRUCTIONS), fn.cache_key, build.identity)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def line(cells: dict[str, Any]) -> str:
    return " ".join(
        f"{cells.get(name, '') or '':{'<' if name in ('op', 'variant', 'tile', 'verdict') else '>'}{width}}"
        for name, width in WIDTHS.items()
    ).rstrip()


def report(builds: Sequence[Build], jobs: int) -> int:
    """Compile, print the table; the number of builds that fail."""
    start = time.perf_counter()
    failed = reused = 0
    print(f"triton {triton.__version__}, {len(builds)} builds; gfx942: VGPRs, spilled VGPRs, bytes of scratch memory")
    print(line({name: name for name in WIDTHS}))
    context = multiprocessing.get_context("fork")  # the modules are loaded; kernels may lie outside any package
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(jobs, mp_context=context) as pool:
        os.environ["TRITON_CACHE_DIR"] = folder  # Triton's own cache would hide compile times and grow without end
        for build, row in zip(builds, pool.map(cached, builds, map(cache_key, builds)), strict=True):
            fault = verdict(build, row)
            failed += bool(fault)
            reused += "cached" in row
            named = {"op": build.op, "variant": build.variant, "target": build.target, "tile": build.tile}
            shown = row | {"s": f"{row['s']:.1f}"} if "s" in row else row
            print(line(named | shown | {"limit": build.limit, "verdict": fault or "ok"}), flush=True)
    took = time.perf_counter() - start
    print(f"{len(builds)} builds, {failed} failed, {reused} from {CACHE.name}, {took:.0f} s")
    return failed


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench aot", description=__doc__.split("\n\n")[0])
    parser.add_argument("--all", action="store_true", help="every build; without it the first call of each op")
    parser.add_argument("--arch", default=",".join(SHARED), help="targets, separated by commas (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="SUBSTR", help="builds whose op, variant and tile contain this")
    parser.add_argument("-j", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    args = parser.parse_args(argv)
    targets = args.arch.split(",")
    if unknown := set(targets) - set(SHARED):
        parser.error(f"--arch {','.join(sorted(unknown))}: expected some of {','.join(SHARED)}")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: the interpreter replaces the compiler")
    builds, missed = all_builds()
    if not args.all:
        first = {build.op: build.variant for build in reversed(builds)}
        training = {call.op for call in training_calls()}
        builds = [
            build
            for build in builds
            if build.variant == first[build.op] and (build.op not in training or build.target in FEW_TARGETS)
        ]
    builds = [b for b in builds if b.target in targets and args.only in f"{b.op} {b.variant} {b.tile}"]
    failed = report(builds, args.j)
    for text in missed:
        print(text)
    return 1 if failed or missed or not builds else 0
